"""Readers of public data formats; each yields rows for `ingest` and stores nothing."""
