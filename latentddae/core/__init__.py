"""Errors, configuration, files, ranks, random numbers. Imports nothing else of the package."""
