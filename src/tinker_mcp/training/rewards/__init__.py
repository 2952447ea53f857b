"""Rewards: graders, and the jail that runs code nobody has vouched for.

`contract.py` says what a reward is; `specs.py` which there are, as JSON; `opening.py` makes one of
the other. `jail.py`, `cell.py` and `pool.py` are this side of the wall, `inside/` is the other.
"""
