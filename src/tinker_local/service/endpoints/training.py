"""Gradients and steps: the server half of `tinker/resources/training.py`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from tinker import types

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import AdamParams, Slices
from tinker_local.service import wire
from tinker_local.service.backend import backend_of
from tinker_local.service.endpoints.bodies import UnreadableTurnError, parse, promised
from tinker_local.service.futures import Reply
from tinker_local.service.usage import usage_of
from tinker_local.service.wire import ForwardBackwardRequest
from tinker_local.service.wire.turns import turn_in_protobuf


async def forward_backward(request: Request) -> Response:
    """Promise log-probabilities and, unless forward_only, an accumulated gradient."""
    backend, usage = backend_of(request), usage_of(request)
    message = _message(await request.body(), request.headers.get("content-encoding") == "zstd")

    def work() -> Slices[Reply]:
        try:
            op = wire.forward_backward_op(message)
            output = yield from backend.engine.forward_backward(op)
        except Exception as error:
            if not message.forward_only:
                backend.sessions.model(message.model_id).failed_backward = str(error)
            raise
        model = backend.sessions.model(message.model_id)
        tokens = sum(len(logprobs) for logprobs in output.logprobs)
        usage.add("training", model.base_model, tokens, model.session_id)
        return wire.loss_reply(output)

    return promised(backend.promise_in_order(message.model_id, message.seq_id, work))


async def optim_step(request: Request) -> Response:
    """Promise an AdamW step on what has been accumulated.

    If a forward_backward since the last step has failed, the gradient is not what the client
    thinks: it is dropped and the step fails.
    """
    backend = backend_of(request)
    wanted = await parse(request, types.OptimStepRequest)
    params = wanted.optim_params

    def work() -> Reply:
        model = backend.sessions.model(wanted.model_id)
        if model.failed_backward is not None:
            reason, model.failed_backward = model.failed_backward, None
            backend.engine.drop_gradient(wanted.model_id)
            raise UserInputError(
                f"No step was taken: a forward_backward before it failed ({reason})",
                "Send the corrected forward_backward and then optim_step again.",
            )
        if not isinstance(params, types.AdamParams):
            raise NotServedError(
                f"tinker-local does not serve the optimizer {params.type!r}.", "Use AdamParams."
            )
        metrics = backend.engine.optim_step(wanted.model_id, AdamParams(**params.model_dump()))
        return wire.json_reply({"metrics": dict(metrics)})

    future = backend.promise_in_order(wanted.model_id, wanted.seq_id or 0, work, ends_step=True)
    return promised(future)


def _message(body: bytes, is_compressed: bool) -> ForwardBackwardRequest:
    """The request's frame.

    Raises:
        UserInputError: It cannot be read, nor whose turn it is.
        UnreadableTurnError: It cannot be read.
    """
    try:
        return wire.parse_forward_backward(wire.decompress(body) if is_compressed else body)
    except UserInputError as error:
        turn = turn_in_protobuf(body, is_compressed=is_compressed)
        if turn is None:
            raise
        raise UnreadableTurnError(error, *turn) from None
