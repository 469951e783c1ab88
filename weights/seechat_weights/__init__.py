"""Describes checkpoints and bundles: file formats, tensor names and precisions. Needs no torch."""

from seechat_weights.telemetry import switch_off

SILENT = switch_off()  # here: lite and export import this package first
