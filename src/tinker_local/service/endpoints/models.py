"""Training clients: the server half of `tinker/resources/models.py`, and load_weights."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tinker import types

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import LoraSpec
from tinker_local.service.backend import Backend, backend_of
from tinker_local.service.checkpoints import Run
from tinker_local.service.endpoints.bodies import parse, promised
from tinker_local.service.futures import Reply
from tinker_local.service.scheduler import Sequencer
from tinker_local.service.sessions import Session, TrainedModel
from tinker_local.service.wire import json_reply

_PURPOSES = {"sampler_weights": "sampling", "external_weights": "download"}


async def create_model(request: Request) -> Response:
    """Promise a fresh adapter on a base model."""
    backend = backend_of(request)
    wanted = await parse(request, types.CreateModelRequest)
    session = backend.sessions.get(wanted.session_id)
    _check_optimizer(wanted.optimizer_config)
    lora = _lora_spec(wanted.lora_config)
    model_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"

    def work() -> Reply:
        backend.engine.create_model(model_id, wanted.base_model, lora)
        _register(backend, session, model_id, wanted.base_model, lora, wanted.user_metadata)
        return json_reply({"type": "create_model", "model_id": model_id})

    return promised(backend.promise_model(model_id, work))


async def load_weights(request: Request) -> Response:
    """Promise a saved state: in a new training client, or in the one that asks."""
    backend = backend_of(request)
    wanted = await parse(request, types.LoadWeightsRequest)
    if wanted.session_id is None:
        return _load_in_place(backend, wanted)
    session = backend.sessions.get(wanted.session_id)
    if wanted.optimizer_config is not None:
        _check_optimizer(wanted.optimizer_config)
    model_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"

    def work() -> Reply:
        run = _load(backend, model_id, wanted)
        _register(backend, session, model_id, run.base_model, run.lora, wanted.user_metadata)
        return json_reply({"type": "load_weights", "path": wanted.path, "model_id": model_id})

    return promised(backend.promise_model(model_id, work))


async def get_info(request: Request) -> Response:
    backend = backend_of(request)
    wanted = await parse(request, types.GetInfoRequest)
    model = backend.sessions.model(wanted.model_id)
    [info] = [base for base in backend.engine.base_models() if base.name == model.base_model]
    return JSONResponse(
        {
            "type": "get_info",
            "model_id": model.model_id,
            "model_name": model.base_model,
            "is_lora": True,
            "lora_rank": model.lora.rank,
            "optimizer_config": {"type": "adamw"},
            "model_data": {
                "arch": "causal-lm",
                "model_name": model.base_model,
                "tokenizer_id": str(info.folder),
            },
        }
    )


def _register(
    backend: Backend,
    session: Session,
    model_id: str,
    base_model: str,
    lora: LoraSpec,
    user_metadata: dict[str, object] | None,
) -> None:
    sequencer = Sequencer(backend.scheduler, model_id, gap_s=backend.gap_s)
    model = TrainedModel(model_id, session.session_id, base_model, lora, sequencer)
    model.sequencer.on_gap = model.note_gap
    session.models[model_id] = model
    backend.catalog.add_run(
        Run(model_id, base_model, lora, datetime.now(UTC).isoformat(), user_metadata or {})
    )


def _lora_spec(config: types.LoraConfig | None) -> LoraSpec:
    if config is None:
        raise NotServedError(
            "create_model came without lora_config: tinker-local trains adapters only.",
            "Use create_lora_training_client.",
        )
    return LoraSpec(**config.model_dump())


def _check_optimizer(config: types.OptimizerConfig) -> None:
    if config.type != "adamw":
        raise NotServedError(
            f"tinker-local does not serve the optimizer {config.type!r}.", "Use AdamW, the default."
        )


def _load_in_place(backend: Backend, wanted: types.LoadWeightsRequest) -> Response:
    """`TrainingClient.load_state`, deprecated in 0.38: the client goes on from another state.

    Gradients that it has accumulated are dropped.
    """
    model_id = wanted.model_id
    if model_id is None or wanted.seq_id is None:
        raise UserInputError("load_weights names no client.", "Use the tinker SDK 0.38.")

    def work() -> Reply:
        model = backend.sessions.model(model_id)
        run = _run_of_state(backend, wanted)
        is_same = _is_same(backend, run.base_model, model.base_model)
        if not is_same or _modules(run.lora) != _modules(model.lora):
            raise UserInputError(
                f"{wanted.path} is of {_described(run.base_model, run.lora)}, this training client "
                f"of {_described(model.base_model, model.lora)}.",
                "Use ServiceClient.create_training_client_from_state.",
            )
        _load(backend, model_id, wanted)
        model.failed_backward = None
        return json_reply({"type": "load_weights", "path": wanted.path, "model_id": model_id})

    return promised(backend.promise_in_order(model_id, wanted.seq_id, work))


def _load(backend: Backend, model_id: str, wanted: types.LoadWeightsRequest) -> Run:
    """Have the engine make `model_id` from the state that is asked for; the state's run."""
    run = _run_of_state(backend, wanted)
    checkpoint = backend.catalog.get(wanted.path)
    backend.engine.load_model(
        model_id,
        run.base_model,
        backend.catalog.folder(checkpoint),
        optimizer=wanted.optimizer,
    )
    return run


def _run_of_state(backend: Backend, wanted: types.LoadWeightsRequest) -> Run:
    checkpoint = backend.catalog.get(wanted.path)
    if checkpoint.kind != "weights":
        raise UserInputError(
            f"{wanted.path} holds weights for {_PURPOSES[checkpoint.kind]}, without an optimizer.",
            "Train on from a state saved with save_state (tinker://.../weights/...).",
        )
    run = backend.catalog.run(checkpoint.run_id)
    if wanted.base_model is not None and not _is_same(backend, wanted.base_model, run.base_model):
        raise UserInputError(
            f"{wanted.path} belongs to {run.base_model}, not to {wanted.base_model}.",
            "Leave base_model out.",
        )
    return run


def _is_same(backend: Backend, name: str, other: str) -> bool:
    """Whether two names mean one model: a folder can be served under several."""
    folders = {info.name: info.folder for info in backend.engine.base_models()}
    return name == other or (name in folders and folders[name] == folders.get(other))


def _modules(lora: LoraSpec) -> LoraSpec:
    """What two adapters must share to take each other's place."""
    return replace(lora, seed=None)


def _described(base_model: str, lora: LoraSpec) -> str:
    modules = [name for name in ("mlp", "attn", "unembed") if getattr(lora, f"train_{name}")]
    return f"{base_model} at rank {lora.rank} ({', '.join(modules)})"
