"""Adapters and optimizers as files: safetensors and JSON, never pickle.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, which PEFT loads as they
are (a vision model's after `tinker_cookbook.weights.build_lora_adapter`), `lora.json`, the
LoraSpec, and, where training may go on from it, `optimizer.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tinker_local.engine.lora import LORA_ALPHA, Adapter, Factors, LoraLinear
from tinker_local.engine.optimizer import AdamW
from tinker_local.errors import NotFoundError
from tinker_local.ops import LoraSpec

_PEFT_PREFIX = "base_model.model."
_ADAPTER, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SPEC, _OPTIMIZER = "lora.json", "optimizer.safetensors"


def save_adapter(adapter: Adapter, base_model: str, folder: Path) -> None:
    """Write `adapter` in PEFT's format, float32."""
    tensors = {}
    for path, factors in adapter.factors.items():
        name = f"{_PEFT_PREFIX}{_saved_name(path)}"
        tensors[f"{name}.lora_A.weight"] = factors.a.detach().cpu().contiguous()
        tensors[f"{name}.lora_B.weight"] = factors.b.detach().cpu().contiguous()
    save_file(tensors, folder / _ADAPTER, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(_peft_config(adapter, base_model), indent=2))
    (folder / _SPEC).write_text(json.dumps(asdict(adapter.spec), indent=2))


def load_adapter(folder: Path, layers: Mapping[str, LoraLinear], *, trainable: bool) -> Adapter:
    """Read what `save_adapter` wrote, onto the device of `layers`.

    Raises:
        NotFoundError: A file is missing.
    """
    spec = LoraSpec(**json.loads(_existing(folder / _SPEC).read_text()))
    tensors = load_file(_existing(folder / _ADAPTER))
    factors = {}
    paths = {_saved_name(path): path for path in layers}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = paths[key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight")]
        b = tensors[key.replace(".lora_A.", ".lora_B.")]
        weight = layers[path].weight
        # One that is only read may as well have the format that the forward pass needs.
        dtype = torch.float32 if trainable else weight.dtype
        factors[path] = Factors(
            *(matrix.to(weight.device, dtype).requires_grad_(trainable) for matrix in (a, b))
        )
    ordered = {path: factors[path] for path in layers if path in factors}
    return Adapter(spec, ordered)


def version(folder: Path) -> int:
    """A number that changes when the folder's adapter is replaced by another."""
    return _existing(folder / _ADAPTER).stat().st_mtime_ns


def save_optimizer(optimizer: AdamW, folder: Path) -> None:
    """Write the moments and step counts, float32."""
    tensors = {
        f"{name}.{index:05d}": tensor.detach().cpu().contiguous()
        for name, values in optimizer.state().items()
        for index, tensor in enumerate(values)
    }
    save_file(tensors, folder / _OPTIMIZER)


def load_optimizer(optimizer: AdamW, folder: Path, device: torch.device) -> None:
    """Read what `save_optimizer` wrote into a fresh optimizer over the same parameters."""
    state: dict[str, list[torch.Tensor]] = {"exp_avg": [], "exp_avg_sq": [], "step": []}
    for key, tensor in sorted(load_file(_existing(folder / _OPTIMIZER)).items()):
        name = key.partition(".")[0]
        # torch keeps the step count on the CPU, whatever the device of the parameter
        state[name].append(tensor if name == "step" else tensor.to(device))
    optimizer.load_state(state)


def _saved_name(path: str) -> str:
    """A layer's path in a file, as Tinker has it and the cookbook's exports expect it: a vision
    model's language model is named like a model of text."""
    return path.replace("model.language_model.", "model.")


def _peft_config(adapter: Adapter, base_model: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.spec.rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in adapter.factors}),
        "inference_mode": True,
    }


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NotFoundError(
            f"The checkpoint lacks {path.name}.", "Pick another one: list the checkpoints."
        )
    return path
