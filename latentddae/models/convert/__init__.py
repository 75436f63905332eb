"""Checkpoints of other projects: names, architecture, conventions, one file per family."""
