"""Compaction, checks and copies of a store in an etcd cluster."""
