"""Shards that nobody indexed, read from end to end."""
