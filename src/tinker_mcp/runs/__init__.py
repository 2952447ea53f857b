"""Training that outlives a call: runs, each in a detached process with its state on disk.

`supervisor` starts, stops and resumes them; `worker` is that process. `planning/` checks what was
asked and makes a `RunSpec` of it; `methods/` has one file a method, the whole loop, and `policy/`
what rl and distillation share; `showing/` reads. Knows nothing of MCP.
"""
