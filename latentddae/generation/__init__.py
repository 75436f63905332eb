"""Images out of checkpoints."""
