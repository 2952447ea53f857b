"""tinker_mcp: an MCP server that gives coding agents the whole of fine-tuning.

```
 coding agent (Claude Code, Codex, Cursor ...)
     | MCP over stdio
 server/     what the agent sees: one file of tools a subject; boundary.py turns errors into text
 training/   the domain, on the tinker SDK and the cookbook: data, clients, loops, sampling
 settings.py every environment variable, read once      errors.py  problem + next step
     | the real tinker SDK over HTTP  <- the only door to a backend
 tinker_local (started when it is needed)  or  hosted Tinker, by TINKER_API_KEY
```

Direction of imports: cli > demo > server > training > settings > errors; checked by import-linter.
Heavy packages (tinker, torch, transformers, tinker_cookbook) are imported inside functions, so
that the server answers `initialize` before any of them is loaded.
"""

__version__ = "0.1.0"
