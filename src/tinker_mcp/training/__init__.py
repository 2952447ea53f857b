"""The domain: data, clients, steps and samples, on the tinker SDK and the cookbook.

It knows nothing of MCP. What goes wrong is raised as a `tinker_mcp.errors.TinkerMcpError`.
"""
