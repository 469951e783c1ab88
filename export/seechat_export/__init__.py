"""Checkpoint → bundle: the step that needs torch, done once per model."""
