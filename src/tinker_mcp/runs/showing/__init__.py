"""Runs as they are read: summaries, series, curves, what is new. Nothing here writes."""
