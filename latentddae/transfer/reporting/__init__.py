"""Results -> tables, plots and one page."""
