"""Training clients: the server half of `tinker/resources/models.py`, and load_weights."""

from __future__ import annotations

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

    return promised(backend.promise(f"{model_id}:0", wanted.session_id, work))


async def load_weights(request: Request) -> Response:
    """Promise a training client made from a saved state."""
    backend = backend_of(request)
    wanted = await parse(request, types.LoadWeightsRequest)
    if wanted.session_id is None:
        return _refuse_load_in_place(backend, wanted)
    session = backend.sessions.get(wanted.session_id)
    if wanted.optimizer_config is not None:
        _check_optimizer(wanted.optimizer_config)
    model_id = f"{wanted.session_id}:train:{wanted.model_seq_id}"

    def work() -> Reply:
        checkpoint = backend.catalog.get(wanted.path)
        if checkpoint.kind != "weights":
            raise UserInputError(
                f"{wanted.path} holds weights for sampling, without an optimizer.",
                "Train on from a state saved with save_state (tinker://.../weights/...).",
            )
        run = backend.catalog.run(checkpoint.run_id)
        if wanted.base_model not in (None, run.base_model):
            raise UserInputError(
                f"{wanted.path} belongs to {run.base_model}, not to {wanted.base_model}.",
                "Leave base_model out.",
            )
        backend.engine.load_model(
            model_id,
            run.base_model,
            backend.catalog.folder(checkpoint),
            optimizer=wanted.optimizer,
        )
        _register(backend, session, model_id, run.base_model, run.lora, wanted.user_metadata)
        return json_reply({"type": "load_weights", "path": wanted.path, "model_id": model_id})

    return promised(backend.promise(f"{model_id}:0", wanted.session_id, work))


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
    session.models[model_id] = TrainedModel(
        model_id, session.session_id, base_model, lora, Sequencer(backend.scheduler)
    )
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


def _refuse_load_in_place(backend: Backend, wanted: types.LoadWeightsRequest) -> Response:
    """`TrainingClient.load_state` is deprecated in 0.38, and not served; its seq_id is used up."""

    def work() -> Reply:
        raise NotServedError(
            "tinker-local does not load a state into an existing training client.",
            "Use ServiceClient.create_training_client_from_state_with_optimizer.",
        )

    if wanted.model_id is None or wanted.seq_id is None:
        raise UserInputError("load_weights names no client.", "Use the tinker SDK 0.38.")
    return promised(backend.promise_in_order(wanted.model_id, wanted.seq_id, work))
