"""Models and data sets that live next to the library."""
