"""The PyTorch half of tinker_local: everything that touches a tensor of the model.

`TorchEngine` carries out the operations of `tinker_local.ops`. It knows nothing of HTTP, of
futures or of names under which checkpoints are listed.
"""

from tinker_local.engine.torch_engine import TorchEngine

__all__ = ["TorchEngine"]
