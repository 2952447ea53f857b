"""tinker_mcp: an MCP server that gives coding agents the whole of fine-tuning.

```
 coding agent (Claude Code, Codex, Cursor, VS Code ...)
     | MCP: stdio or streamable HTTP
 cli/        argv -> one call      demo.py  an agent's whole job, through the tools
 server/     what the agent sees
   app.py       create_server: one lifespan, one table of tools
   boundary.py  how a function becomes a tool; errors as text      schemas.py, reply_size.py,
                progress.py  how little it costs the agent, and that it lives
   tools/       one file a subject
   prompts.py   resources.py   completions.py   docs.py (the manual, searched)
   lifecycle.py (stdio, and the end)   http.py
 runs/       training that outlives a call
   planning/    what was asked -> a checked RunSpec, with its cost      spec.py, states.py
   methods/     one file a method: the whole loop, on attempt.py and pipeline.py
   policy/      what rl and distillation share: rollouts, environments, the teacher
   supervisor.py (start, watch, stop, resume)   worker.py (the detached process)
   journal.py, folder.py (what it writes)       showing/ (what is read)
 scripting.py  what scripts/ share: programs on the plain SDK, without server or runs
 store/      runs, metrics, checkpoints and events in SQLite; the only room with SQL
 training/   the domain, on the tinker SDK and the cookbook: data, clients, loops, sampling
 docs/       the manual's pages     prompts/ (in the wheel; at the repository's top)  workflows
 settings.py every environment variable, read once      errors.py  problem + next step
 garbage.py  the collector, left out of imports and of building many objects
     | the real tinker SDK over HTTP  <- the only door to a backend
 tinker_local (started when it is needed)  or  hosted Tinker, by TINKER_API_KEY
```

Direction of imports: cli > demo > server > (runs | scripting) > (training | store) > settings >
(errors | garbage); checked by import-linter.
Heavy packages (tinker, torch, transformers, tinker_cookbook) are imported inside functions, so
that the server answers `initialize` before any of them is loaded.
"""

__version__ = "0.1.0"
