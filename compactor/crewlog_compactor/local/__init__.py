"""Compaction, retention, checks and repair of a store in a directory."""
