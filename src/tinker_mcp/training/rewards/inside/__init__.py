"""What runs in a jail's own process: the standard library alone, and started by `cell.py` only."""
