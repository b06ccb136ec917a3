"""The page that `timeline --html` writes: one file with its style and script inside."""
