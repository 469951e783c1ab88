"""Turns a checkpoint into a bundle: the step that needs torch, done once per model."""

import seechat_weights  # noqa: F401 (first: it switches off others' telemetry)
