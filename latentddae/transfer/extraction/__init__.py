"""Network + images -> arrays of features."""
