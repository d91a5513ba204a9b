"""Pruning methods beside each other at equal measured latency."""
