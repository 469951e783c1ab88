"""What checkpoints and bundles are: formats, names, precisions. Needs no torch."""

from seechat_weights.telemetry import switch_off

SILENT = switch_off()  # here, since lite and export import this package before anything else
