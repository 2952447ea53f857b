"""Durable state: SQLite with a write-ahead log, in one file of the user's home.

The only room with SQL. It decides nothing.
"""
