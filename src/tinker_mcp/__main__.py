"""`python -m tinker_mcp` is `tinker-mcp`."""

from tinker_mcp.cli import main

main()
