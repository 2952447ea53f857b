"""TorchEngine: the operations of `tinker_local.ops` on PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tinker_local.engine import checkpoints, gradients, lora, sample_checks
from tinker_local.engine.base_model import BaseModel, context_length
from tinker_local.engine.hardware import (
    DtypeName,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    spare_garbage_collector,
)
from tinker_local.engine.optimizer import AdamW
from tinker_local.engine.sampler import Sampler
from tinker_local.engine.vision import AnyModel, VisionModel, is_vision_model
from tinker_local.engine.vision_sampler import VisionSampler
from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import (
    AdamParams,
    BaseModelInfo,
    BaseWeights,
    ForwardBackward,
    LoraSpec,
    LossOutput,
    Sample,
    SampleOutput,
    SamplerWeights,
    Slices,
)

_SAMPLERS_KEPT = 5  # 60 MB each at rank 32 of a 135M-parameter model in bfloat16
MAX_RANK = 512

_Weights: TypeAlias = tuple[Path, int | None]
"""A base model's folder and None, or that of a saved adapter and its version."""

_AnySampler: TypeAlias = Sampler | VisionSampler


@dataclass(frozen=True)
class _Trained:
    """A training client's share of the engine."""

    base: AnyModel
    adapter: lora.Adapter
    optimizer: AdamW


class TorchEngine:
    """Trains and samples the given base models, each loaded when it is first needed.

    Not thread-safe: one call at a time.
    """

    def __init__(self, models: Mapping[str, Path], dtype: DtypeName = "auto") -> None:
        keep_freed_memory()
        self._infos = {
            name: BaseModelInfo(name, folder, context_length(folder))
            for name, folder in models.items()
        }
        self.device = pick_device()
        self.dtype = pick_dtype(dtype, self.device)
        self._bases: dict[Path, AnyModel] = {}
        self._trained: dict[str, _Trained] = {}
        # The least recently used first.
        self._samplers: OrderedDict[_Weights, _AnySampler] = OrderedDict()

    def base_models(self) -> Sequence[BaseModelInfo]:
        return list(self._infos.values())

    def create_model(self, model_id: str, base_model: str, lora_spec: LoraSpec) -> None:
        if not 1 <= lora_spec.rank <= MAX_RANK:
            raise UserInputError(f"rank {lora_spec.rank} is out of range.", f"Use 1 to {MAX_RANK}.")
        base = self._base(base_model)
        adapter = lora.new_adapter(base.layers, lora_spec)
        if not adapter.factors:
            raise UserInputError(
                "Nothing would be trained.", "Set train_mlp, train_attn or train_unembed."
            )
        self._trained[model_id] = _Trained(base, adapter, AdamW(adapter.parameters()))

    def load_model(self, model_id: str, base_model: str, folder: Path, *, optimizer: bool) -> None:
        base = self._base(base_model)
        adapter = checkpoints.load_adapter(folder, base.layers, trainable=True)
        trained = _Trained(base, adapter, AdamW(adapter.parameters()))
        if optimizer:
            checkpoints.load_optimizer(trained.optimizer, folder, base.device)
        self._trained[model_id] = trained

    def drop_model(self, model_id: str) -> None:
        self._trained.pop(model_id, None)

    def forward_backward(self, op: ForwardBackward) -> Slices[LossOutput]:
        trained = self._trained_model(op.model_id)
        op = gradients.check(op, trained.base)
        return gradients.run(op, trained.base, trained.adapter)

    def drop_gradient(self, model_id: str) -> None:
        for parameter in self._trained_model(model_id).adapter.parameters():
            parameter.grad = None

    def optim_step(self, model_id: str, params: AdamParams) -> Mapping[str, float]:
        return self._trained_model(model_id).optimizer.step(params)

    def save_state(self, model_id: str, folder: Path) -> None:
        trained = self._trained_model(model_id)
        checkpoints.save_adapter(trained.adapter, trained.base.info.name, folder)
        checkpoints.save_optimizer(trained.optimizer, folder)

    def save_sampler(self, model_id: str, folder: Path) -> None:
        trained = self._trained_model(model_id)
        checkpoints.save_adapter(trained.adapter, trained.base.info.name, folder)

    def start_sample(self, ticket: str, op: Sample) -> None:
        base = self._base(op.weights.base_model)
        op = sample_checks.check(op, base)
        self._sampler(op.weights, base).start(ticket, op)

    def continue_samples(self) -> Mapping[str, SampleOutput | Exception]:
        results: dict[str, SampleOutput | Exception] = {}
        for key, sampler in list(self._samplers.items()):
            if sampler.is_idle:
                continue
            try:
                results |= sampler.step()
            except Exception as error:  # what goes wrong in a step goes wrong for all in it
                results |= dict.fromkeys(sampler.tickets, error)
                del self._samplers[key]
        return results

    def stop_sample(self, ticket: str) -> None:
        for sampler in self._samplers.values():
            sampler.stop(ticket)

    def _base(self, name: str) -> AnyModel:
        if name not in self._infos:
            served = ", ".join(self._infos)
            raise UserInputError(
                f"The base model {name!r} is not served here.", f"Use one of: {served}."
            )
        folder = self._infos[name].folder  # one model, however many names it is served under
        if folder not in self._bases:
            kind = VisionModel if is_vision_model(folder) else BaseModel
            self._bases[folder] = kind(self._infos[name], self.dtype, self.device)
            spare_garbage_collector()
        return self._bases[folder]

    def _trained_model(self, model_id: str) -> _Trained:
        if model_id not in self._trained:
            raise NotFoundError(
                f"No training client {model_id!r} is in memory.",
                "Create one, from its last saved state if there is one.",
            )
        return self._trained[model_id]

    def _sampler(self, weights: SamplerWeights, base: AnyModel) -> _AnySampler:
        """What draws with these weights; those out of use for long are read from disk again."""
        key: _Weights = (base.info.folder, None)
        if not isinstance(weights, BaseWeights):
            key = (weights.folder, checkpoints.version(weights.folder))
        if key not in self._samplers:
            adapter = None
            if key[1] is not None:
                adapter = checkpoints.load_adapter(key[0], base.layers, trainable=False)
            self._samplers[key] = (
                VisionSampler(base, adapter)
                if isinstance(base, VisionModel)
                else Sampler(base, adapter)
            )
        self._samplers.move_to_end(key)
        idle = [old for old, sampler in self._samplers.items() if sampler.is_idle and old != key]
        for old in idle[: max(0, len(self._samplers) - _SAMPLERS_KEPT)]:
            del self._samplers[old]
        return self._samplers[key]
