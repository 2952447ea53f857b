"""Forward and backward passes over a batch of datums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from tinker_local.engine import batches
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.losses import LOSSES, check_inputs, target_logprobs
from tinker_local.errors import UserInputError
from tinker_local.ops import ForwardBackward, LossOutput, TrainingDatum

_HEAD_TOKENS = 512


def check(op: ForwardBackward, model: BaseModel) -> None:
    """Refuse a request that cannot work before anything is computed.

    Raises:
        UserInputError: The first datum that is empty, too long, uses ids outside the vocabulary
            or lacks what its loss needs.
    """
    if not op.data:
        raise UserInputError("forward_backward got no data.", "Send at least one datum.")
    limit = model.info.max_context_length
    for position, datum in enumerate(op.data):
        length = len(datum.tokens)
        if not 0 < length <= limit:
            raise UserInputError(
                f"data[{position}] has {length} tokens; {model.info.name} takes 1 to {limit}.",
                "Truncate or split it (max_length).",
            )
        check_inputs(op.loss_fn, op.loss_fn_config, position, length, datum.loss_fn_inputs)
        _check_ids(f"data[{position}].model_input", datum.tokens, model.vocabulary)
        targets = datum.loss_fn_inputs["target_tokens"]
        _check_ids(f"data[{position}].target_tokens", targets, model.vocabulary)


def run(op: ForwardBackward, model: BaseModel, parameters: Sequence[torch.Tensor]) -> LossOutput:
    """Score the data and, unless `forward_only`, add the loss's gradient to `parameters`.

    The adapter must be active. Nothing is added when any part fails.
    """
    held = [parameter.grad for parameter in parameters]
    _set_gradients(parameters, [None] * len(parameters))
    try:
        output = _score(op, model)
    except BaseException:
        _set_gradients(parameters, held)
        raise
    _add_gradients(parameters, held)
    return output


def _score(op: ForwardBackward, model: BaseModel) -> LossOutput:
    on_gpu = model.device.type == "cuda"
    max_tokens = batches.MAX_BATCH_TOKENS_GPU if on_gpu else batches.MAX_BATCH_TOKENS
    logprobs: list[np.ndarray] = [np.empty(0, np.float32)] * len(op.data)
    loss_sum = 0.0
    with torch.set_grad_enabled(not op.forward_only):
        for group in batches.pack([len(datum.tokens) for datum in op.data], max_tokens):
            scored = _batch_logprobs([op.data[index] for index in group], model)
            losses = [
                LOSSES[op.loss_fn](scores, _on_device(op.data[index].loss_fn_inputs, model.device))
                for index, scores in zip(group, scored, strict=True)
            ]
            loss = torch.stack(losses).sum()
            if not op.forward_only:
                loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
            loss_sum += float(loss.detach())
            for index, scores in zip(group, scored, strict=True):
                logprobs[index] = scores.detach().cpu().numpy()
    return LossOutput(logprobs, {"loss:sum": loss_sum})


def _batch_logprobs(data: Sequence[TrainingDatum], model: BaseModel) -> Sequence[torch.Tensor]:
    """Log-probabilities of each datum's targets, (N,) float32 each, in one forward pass."""
    lengths = [len(datum.tokens) for datum in data]
    tokens = torch.zeros(len(data), max(lengths), dtype=torch.int64)  # (B, T), padded right
    for row, datum in enumerate(data):
        tokens[row, : lengths[row]] = torch.from_numpy(datum.tokens)
    is_real = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # (B, T)
    targets = np.concatenate([datum.loss_fn_inputs["target_tokens"] for datum in data])

    hidden = model.hidden_states(tokens.to(model.device))  # (B, T, H)
    hidden = hidden[is_real.to(model.device)]  # (sum of lengths, H)
    scores = _head_logprobs(hidden, torch.from_numpy(targets).to(model.device), model)
    return torch.split(scores, lengths)


def _head_logprobs(hidden: torch.Tensor, targets: torch.Tensor, model: BaseModel) -> torch.Tensor:
    """Log-probabilities (M,) of targets (M,) from hidden states (M, H).

    Logits are the largest tensors of a step: 0.2 MB a token at a vocabulary of 49,152, and the
    softmax keeps several of that size. So a long sequence goes through the head in pieces whose
    logits are computed again for the backward pass instead of being kept.
    """

    def score(some_hidden: torch.Tensor, some_targets: torch.Tensor) -> torch.Tensor:
        return target_logprobs(model.logits(some_hidden), some_targets)

    if len(targets) <= _HEAD_TOKENS:
        return score(hidden, targets)
    pieces = zip(torch.split(hidden, _HEAD_TOKENS), torch.split(targets, _HEAD_TOKENS), strict=True)
    scores = [checkpoint(score, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(scores)


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
