"""Processes of this machine: who one is, whether it lives, how one is started and signalled."""
