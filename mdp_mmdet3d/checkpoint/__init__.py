"""Checkpoints: read without running code, checked against the model before anything of them is used."""
