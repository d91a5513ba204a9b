"""What each part of a model is WORTH: Taylor importance, collected on backward, saved as a table."""
