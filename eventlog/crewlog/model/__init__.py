"""What a log says and what follows from it: pure functions of values."""
