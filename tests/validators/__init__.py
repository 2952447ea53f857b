"""The ecosystem's own validators against our server: `python -m tests.validators`."""
