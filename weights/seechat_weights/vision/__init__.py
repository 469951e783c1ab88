"""Describes the vision networks and finds their weights."""
