"""The PyTorch half of tinker_local: everything that touches a tensor of the model.

`TorchEngine` carries out the operations of `tinker_local.ops`. It knows nothing of HTTP, of
futures or of names under which checkpoints are listed.
"""

from tinker_local.engine import compiler_later

compiler_later.stand_in()

from tinker_local.engine.torch_engine import TorchEngine  # noqa: E402 - imports transformers' models

__all__ = ["TorchEngine"]
