"""What came out, for people and programs: ``report.json``, the closing table, pictures."""
