"""Arrays -> probe results: pure functions, no files, ranks or command lines."""
