"""Shards without an index, read from end to end."""
