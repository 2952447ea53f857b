"""The HTTP half of tinker_local: Tinker's wire protocol as SDK 0.38 speaks it.

It knows sessions, order, futures and the names of checkpoints; what a request computes is the
engine's business, reached through `tinker_local.ops` alone.
"""

from tinker_local.service.app import create_app, say_goodbye
from tinker_local.service.clock import CycleClock

__all__ = ["CycleClock", "create_app", "say_goodbye"]
