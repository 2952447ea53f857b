"""Training that outlives a call: runs, each in a detached process with its state on disk.

`supervisor` starts, stops and resumes them; `worker` is that process; `methods/` has one file a
method, the whole loop; `plan` checks what was asked and makes a `RunSpec` of it; `views` reads.
Knows nothing of MCP.
"""
