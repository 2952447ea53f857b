"""How code inside a jail says that something cannot go on."""

EXIT_MEMORY, EXIT_THREADS = 252, 253
"""Exit statuses of a launcher that has seen one of these limits exceeded."""


class UnusableError(Exception):
    """A program, its arguments or a row cannot be used; the sentence says why."""
