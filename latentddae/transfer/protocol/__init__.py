"""What is chosen on what: splits, cells, search, sessions."""
