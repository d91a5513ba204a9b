"""Generated data sets in real formats."""
