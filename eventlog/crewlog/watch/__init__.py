"""Readers that wait for changes: woken where that works, and looking by themselves where not."""
