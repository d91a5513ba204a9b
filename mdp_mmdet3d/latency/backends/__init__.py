"""Adapters that measure operators: one file per runtime, imported only when used."""
