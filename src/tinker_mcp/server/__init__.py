"""What the agent sees: tools, each a thin layer over one call into `training`."""

from tinker_mcp.server.app import create_server

__all__ = ["create_server"]
