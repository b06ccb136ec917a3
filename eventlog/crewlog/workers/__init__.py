"""Workers that are registered, started, judged and stopped, on top of a session."""
