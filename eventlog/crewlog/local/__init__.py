"""The store in a directory of this machine, and the protocol that keeps it true through crashes."""
