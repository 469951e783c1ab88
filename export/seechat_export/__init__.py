"""Checkpoint → bundle: the step that needs torch, done once per model."""

import seechat_weights  # noqa: F401 (first: it keeps the libraries that follow from reporting)
