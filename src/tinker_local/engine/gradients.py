"""Forward and backward passes over a batch of datums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from tinker_local.engine import batches
from tinker_local.engine.base_model import LanguageModel
from tinker_local.engine.batches import Batch
from tinker_local.engine.head import target_logprobs
from tinker_local.engine.lora import Adapter
from tinker_local.engine.loss_checks import (
    check_finite,
    check_inputs,
    complete_config,
    loss_spec,
)
from tinker_local.engine.packed import PackedSequences
from tinker_local.engine.vision import AnyModel, VisionModel
from tinker_local.errors import UserInputError
from tinker_local.ops import ForwardBackward, LossOutput, Slices, Tokens, TrainingDatum


def check(op: ForwardBackward, model: LanguageModel) -> ForwardBackward:
    """Refuse a request that cannot work before anything is computed.

    Returns:
        It, with the tokens of images among the others.

    Raises:
        UserInputError: The first datum that is empty, too long, uses ids outside the vocabulary
            or lacks what its loss needs; a loss or a config that cannot work.
        NotServedError: A loss of Tinker's that this server has not.
    """
    complete_config(op.loss_fn, op.loss_fn_config)
    if not op.data:
        raise UserInputError("forward_backward got no data.", "Send at least one datum.")
    op = replace(op, data=[_laid_out(n, datum, model) for n, datum in enumerate(op.data)])
    limit = model.info.max_context_length
    for position, datum in enumerate(op.data):
        length = len(datum.tokens)
        if not 0 < length <= limit:
            raise UserInputError(
                f"data[{position}] has {length} tokens; {model.info.name} takes 1 to {limit}.",
                "Truncate or split it (max_length).",
            )
        check_inputs(op.loss_fn, position, length, datum.loss_fn_inputs)
        _check_ids(f"data[{position}].model_input", datum.tokens, model.vocabulary)
        targets = datum.loss_fn_inputs["target_tokens"]
        _check_ids(f"data[{position}].target_tokens", targets, model.vocabulary)
    return op


def _laid_out(position: int, datum: TrainingDatum, model: LanguageModel) -> TrainingDatum:
    tokens, images = model.laid_out(datum.tokens, datum.images, f"data[{position}]")
    return replace(datum, tokens=tokens, images=images)


def run(op: ForwardBackward, model: AnyModel, adapter: Adapter) -> Slices[LossOutput]:
    """Score checked data and, unless `forward_only`, add the loss's gradient to the adapter's.

    Yields between batches, so that other work can be done meanwhile. Nothing is added when any
    part fails or when it is closed before its end.
    """
    parameters = adapter.parameters()
    held = [parameter.grad for parameter in parameters]
    _set_gradients(parameters, [None] * len(parameters))
    try:
        output = yield from _score(op, model, adapter)
    except BaseException:
        _set_gradients(parameters, held)
        raise
    _add_gradients(parameters, held)
    return output


def _score(op: ForwardBackward, model: AnyModel, adapter: Adapter) -> Slices[LossOutput]:
    spec, config = loss_spec(op.loss_fn), complete_config(op.loss_fn, op.loss_fn_config)
    logprobs: list[np.ndarray] = [np.empty(0, np.float32)] * len(op.data)
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in _plan(op.data, model):
        with torch.set_grad_enabled(not op.forward_only), model.adapted(adapter):
            scored = _batch_logprobs(batch, op.data, model)
            losses = []
            for index, scores in zip(batch.members, scored, strict=True):
                inputs = _on_device(op.data[index].loss_fn_inputs, model.device)
                losses.append(spec.function(scores, inputs, config))
                for name, value in spec.metrics(scores, inputs, config).items():
                    sums[name] += float(value)
                logprobs[index] = scores.detach().cpu().numpy()
            loss = torch.stack(losses)
            if not op.forward_only:
                _check_converged(scored)
                check_finite(op.loss_fn, batch.members, loss.tolist())
                loss.sum().backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            sums["loss:sum"] += float(loss.detach().sum())
        yield
    return LossOutput(logprobs, dict(sums))


def _plan(data: Sequence[TrainingDatum], model: AnyModel) -> Sequence[Batch]:
    if isinstance(model, VisionModel):  # it reads one sequence at a time
        return [Batch((index,)) for index in range(len(data))]
    on_gpu = model.device.type == "cuda"
    max_tokens = batches.MAX_BATCH_TOKENS_GPU if on_gpu else batches.MAX_BATCH_TOKENS
    return batches.plan([datum.tokens for datum in data], max_tokens)


def _check_converged(scored: Sequence[torch.Tensor]) -> None:
    if not all(torch.isfinite(scores).all() for scores in scored):
        raise UserInputError(
            "The log-probabilities are not finite: the weights have diverged.",
            "Lower the learning rate, and train on from the last good state.",
        )


def _batch_logprobs(
    batch: Batch, data: Sequence[TrainingDatum], model: AnyModel
) -> Sequence[torch.Tensor]:
    """Log-probabilities of each member's targets, (N,) or (N, K) float32, in one forward pass."""
    members = [data[index] for index in batch.members]
    own = [datum.tokens[batch.prefix :] for datum in members]
    hidden = _hidden(batch.prefix, own, members[0], model)  # (T, H)

    targets = [datum.loss_fn_inputs["target_tokens"] for datum in members]
    asked = [  # which hidden state each target is asked of; the prefix's by every member
        np.repeat(rows, array.size // len(array))
        for rows, array in zip(_rows(batch.prefix, own), targets, strict=True)
    ]
    scores = target_logprobs(
        hidden,
        torch.from_numpy(np.concatenate(asked)).to(model.device),
        torch.from_numpy(np.concatenate([array.ravel() for array in targets])).to(model.device),
        model.head,
    )
    sizes = [array.size for array in targets]
    return [
        part.view(array.shape)
        for part, array in zip(torch.split(scores, sizes), targets, strict=True)
    ]


def _hidden(
    prefix: int, own: Sequence[Tokens], first: TrainingDatum, model: AnyModel
) -> torch.Tensor:
    """Last hidden states (T, H) of a packed row: the prefix, then each member's own tokens."""
    if isinstance(model, VisionModel):
        return model.read(first.tokens, first.images).hidden
    layout = PackedSequences(prefix, [len(tokens) for tokens in own], model.device)
    tokens = np.concatenate([first.tokens[:prefix], *own])  # (T,)
    return model.hidden_states(torch.from_numpy(tokens).to(model.device), layout)


def _rows(prefix: int, own: Sequence[Tokens]) -> Iterator[Tokens]:
    """Of each member, the places of its tokens in the packed row: the prefix, then its own."""
    start = prefix
    for tokens in own:
        yield np.concatenate([np.arange(prefix), np.arange(start, start + len(tokens))])
        start += len(tokens)


def _on_device(
    inputs: Mapping[str, np.ndarray], device: torch.device
) -> Mapping[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def _check_ids(name: str, ids: np.ndarray, vocabulary: int) -> None:
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise UserInputError(
            f"{name} holds token id {int(outside[0])}; the vocabulary has 0 to {vocabulary - 1}.",
            "Encode with this model's own tokenizer.",
        )


def _set_gradients(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _add_gradients(
    parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
