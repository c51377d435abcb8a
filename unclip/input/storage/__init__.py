"""Where bytes lie: local files, object stores, a cache of blocks."""
