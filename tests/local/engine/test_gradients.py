from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_data import plain_logits, plain_logprobs, random_adapter

from tinker_local.engine import batches, checkpoints, gradients, head, lora
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.packed import PackedSequences
from tinker_local.errors import UserInputError
from tinker_local.ops import ForwardBackward, LossOutput, TrainingDatum
from tiny_data import cross_entropy_op, op_datum, run_slices

TEXTS = ("the cat sat", "a", "dogs run far away from here", "on the mat", "it is", "x y z")


def _run(op: ForwardBackward, model: BaseModel, adapter: lora.Adapter) -> LossOutput:
    gradients.check(op, model)
    return run_slices(gradients.run(op, model, adapter))


def _taken(adapter: lora.Adapter) -> list[torch.Tensor]:
    """The gradients, which are cleared."""
    taken = []
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        taken.append(parameter.grad)
        parameter.grad = None
    return taken


def _texts_op(*texts: str, **options: Any) -> ForwardBackward:
    return cross_entropy_op("any", *(f"{text}." for text in texts), **options)


def _assert_close(first: list[torch.Tensor], second: list[torch.Tensor], atol: float) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # about merging, not done
@pytest.mark.filterwarnings("ignore::DeprecationWarning:peft")
def test_logprobs_and_gradients_equal_those_of_peft_with_our_saved_adapter(
    base_model: BaseModel, adapter: lora.Adapter, tiny_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoints.save_adapter(adapter, base_model.info.name, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    tokens = torch.tensor([list(b"the cat sat on the mat")])
    logits = peft(input_ids=tokens[:, :-1]).logits
    theirs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze()
    (-theirs.sum()).backward()

    ours = _run(cross_entropy_op("any", "the cat sat on the mat"), base_model, adapter)

    layout = PackedSequences(0, [tokens.shape[1] - 1], tokens.device)
    with base_model.adapted(adapter), torch.no_grad():
        our_logits = base_model.logits(base_model.hidden_states(tokens[0, :-1], layout))
    torch.testing.assert_close(our_logits, logits[0].detach(), atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.logprobs[0], theirs.detach().numpy(), atol=1e-5)
    parameters = dict(peft.named_parameters())
    for path, factors in adapter.factors.items():
        for name, matrix in (("lora_A", factors.a), ("lora_B", factors.b)):
            parameter = parameters[f"base_model.model.{path}.{name}.default.weight"]
            torch.testing.assert_close(matrix.grad, parameter.grad, atol=1e-5, rtol=1e-4)


def test_one_batch_and_many_give_the_same_loss_and_gradient(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = _texts_op(*TEXTS)
    together = _run(op, base_model, adapter)
    gradient = _taken(adapter)

    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 12)
    apart = _run(op, base_model, adapter)

    assert apart.metrics["loss:sum"] == pytest.approx(together.metrics["loss:sum"], rel=1e-6)
    _assert_close(_taken(adapter), gradient, atol=1e-4)
    for one, other in zip(apart.logprobs, together.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_head_in_pieces_gives_the_same_loss_and_gradient(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(_texts_op(*TEXTS), base_model, adapter)
    gradients_of_whole = _taken(adapter)
    monkeypatch.setattr(head, "_ROWS_KEPT", 5)  # of 57 rows
    pieces = _run(_texts_op(*TEXTS), base_model, adapter)

    assert pieces.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    _assert_close(_taken(adapter), gradients_of_whole, atol=1e-5)


PREFIX = list(b"The same question for all of them: ")  # 35 tokens
LONG = list(b"0123456789" * 20)

BATCHES = {
    "one sequence": ([list(b"the cat sat on the mat")], 0),
    "equal lengths": ([list(b"the cat"), list(b"a dog, "), list(b"it was!")], 0),
    "unequal lengths": ([list(b"the cat sat on the mat"), list(b"ab"), list(b"a dog")], 0),
    "a shared prefix, equal lengths": ([[*PREFIX, *b"yes"], [*PREFIX, *b"no."]], 35),
    "a shared prefix, unequal lengths": (
        [[*PREFIX, *b"yes, it is"], [*PREFIX, *b"no"], [*PREFIX, *b"perhaps"]],
        35,
    ),
    "more than the 128 queries of a block": ([[*b"x", *LONG], [*b"y", *LONG[:130]]], 0),
    "more than 128 after a shared prefix": (
        [[*PREFIX, *b"x", *LONG], [*PREFIX, *b"y", *LONG[:140]], [*PREFIX, *b"zz"]],
        35,
    ),
}


def _op_of(sequences: Sequence[Sequence[int]]) -> ForwardBackward:
    """Cross-entropy whose weights differ by position and member; the first is always 0."""
    data = []
    for number, sequence in enumerate(sequences, start=1):
        tokens = np.array(sequence, dtype=np.int64)
        weights = np.float32(number) * np.linspace(0, 1, len(tokens) - 1, dtype=np.float32)
        data.append(TrainingDatum(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights}))
    return ForwardBackward("any", data, "cross_entropy")


def _alone(
    op: ForwardBackward, sequences: Sequence[Sequence[int]], plain: Any, adapter: lora.Adapter
) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Logprobs and gradients of each sequence alone through transformers' own attention."""
    logprobs, losses = [], []
    for datum, sequence in zip(op.data, sequences, strict=True):
        scores = plain_logprobs(plain, adapter, sequence)
        losses.append(-(scores * torch.tensor(datum.loss_fn_inputs["weights"])).sum())
        logprobs.append(scores.detach().numpy())
    found = torch.autograd.grad(torch.stack(losses).sum(), adapter.parameters())
    return logprobs, list(found)


@pytest.mark.parametrize("name", BATCHES)
def test_packed_sequences_train_as_each_does_alone_in_transformers(
    base_model: BaseModel, adapter: lora.Adapter, plain: Any, name: str
) -> None:
    sequences, prefix = BATCHES[name]
    op = _op_of(sequences)
    [batch] = batches.plan([datum.tokens for datum in op.data], batches.MAX_BATCH_TOKENS)
    assert batch.prefix == prefix

    ours = _run(op, base_model, adapter)

    logprobs, expected = _alone(op, sequences, plain, adapter)
    for one, other in zip(ours.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for gradient, other in zip(_taken(adapter), expected, strict=True):
        assert float((gradient - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("name", BATCHES)
def test_in_bfloat16_gradients_stay_within_two_percent_of_float32(
    half_model: BaseModel, plain: Any, name: str
) -> None:
    sequences, _ = BATCHES[name]
    adapter = random_adapter(half_model)
    op = _op_of(sequences)

    ours = _run(op, half_model, adapter)

    logprobs, expected = _alone(op, sequences, plain, adapter)
    for one, other in zip(ours.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=0.1)
    difference = [one - other for one, other in zip(_taken(adapter), expected, strict=True)]
    assert _norm(difference) / _norm(expected) < 0.02


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().square().sum()) for tensor in tensors))


def test_several_targets_a_position_have_the_gradient_of_the_soft_label(
    base_model: BaseModel, adapter: lora.Adapter, plain: Any
) -> None:
    tokens = list(b"the cat sat")
    targets = np.array([[(7 * n) % 259, (11 * n) % 259] for n in range(len(tokens))])
    weights = np.array([[0.75, 0.25]] * len(tokens), np.float32)
    inputs = {"target_tokens": targets, "weights": weights}
    op = ForwardBackward("any", [TrainingDatum(np.array(tokens), inputs)], "cross_entropy")

    ours = _run(op, base_model, adapter)

    scores = plain_logits(plain, adapter, tokens).log_softmax(-1).gather(-1, torch.tensor(targets))
    expected = torch.autograd.grad(-(scores * torch.tensor(weights)).sum(), adapter.parameters())
    np.testing.assert_allclose(ours.logprobs[0], scores.detach().numpy(), atol=1e-5)
    for gradient, other in zip(_taken(adapter), expected, strict=True):
        assert float((gradient - other).norm() / other.norm()) < 1e-5


def test_logprobs_come_back_in_the_order_and_length_of_the_data(
    base_model: BaseModel, adapter: lora.Adapter
) -> None:
    together = _run(_texts_op(*TEXTS), base_model, adapter).logprobs

    for text, logprobs in zip(TEXTS, together, strict=True):
        [alone] = _run(_texts_op(text), base_model, adapter).logprobs
        assert alone.shape == (len(text),)
        np.testing.assert_allclose(logprobs, alone, atol=1e-5)


def test_gradients_add_up_over_calls(base_model: BaseModel, adapter: lora.Adapter) -> None:
    _run(_texts_op(*TEXTS), base_model, adapter)
    at_once = _taken(adapter)

    _run(_texts_op(*TEXTS[:2]), base_model, adapter)
    _run(_texts_op(*TEXTS[2:]), base_model, adapter)

    _assert_close(_taken(adapter), at_once, atol=1e-4)


def test_the_loss_is_the_weighted_sum_of_the_logprobs(
    base_model: BaseModel, adapter: lora.Adapter
) -> None:
    output = _run(_texts_op("a cat", "dog", weight=0.25), base_model, adapter)

    total = sum(float(logprobs.sum()) for logprobs in output.logprobs)
    assert output.metrics == {"loss:sum": pytest.approx(-0.25 * total, rel=1e-6)}


def test_a_forward_alone_gives_the_same_logprobs_and_no_gradient(
    base_model: BaseModel, adapter: lora.Adapter
) -> None:
    trained = _run(_texts_op("a cat"), base_model, adapter)
    held = _taken(adapter)

    scored = _run(_texts_op("a cat", forward_only=True), base_model, adapter)

    assert held
    np.testing.assert_array_equal(scored.logprobs[0], trained.logprobs[0])
    assert all(parameter.grad is None for parameter in adapter.parameters())


def _held(base_model: BaseModel, adapter: lora.Adapter) -> list[torch.Tensor]:
    """A copy of the gradients that an earlier call has left."""
    _run(_texts_op("a cat"), base_model, adapter)
    return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def _assert_equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_call_that_fails_midway_leaves_earlier_gradients_as_they_were(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _held(base_model, adapter)
    # Longest first, so the good datum's gradient is there when the bad one's shape fails.
    bad = TrainingDatum(
        np.array([97]),
        {"target_tokens": np.array([97, 98]), "weights": np.ones(1, np.float32)},
    )
    op = ForwardBackward("any", [op_datum("a longer one"), bad], "cross_entropy")
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)

    slices = gradients.run(op, base_model, adapter)
    next(slices)
    with pytest.raises((RuntimeError, ValueError)):
        next(slices)

    _assert_equal(_taken(adapter), before)


@pytest.mark.parametrize("batches_done", [0, 1, 3])
def test_a_call_closed_early_leaves_earlier_gradients_as_they_were(
    base_model: BaseModel,
    adapter: lora.Adapter,
    monkeypatch: pytest.MonkeyPatch,
    batches_done: int,
) -> None:
    before = _held(base_model, adapter)
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    slices = gradients.run(_texts_op(*TEXTS), base_model, adapter)
    for _ in range(batches_done):
        next(slices)

    slices.close()

    _assert_equal(_taken(adapter), before)


def test_a_call_closed_early_leaves_no_gradient_where_none_was(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    slices = gradients.run(_texts_op(*TEXTS), base_model, adapter)
    next(slices)

    slices.close()

    assert all(parameter.grad is None for parameter in adapter.parameters())


def test_a_call_pauses_after_every_batch_with_no_adapter_active(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    pauses = 0

    for _ in gradients.run(_texts_op(*TEXTS), base_model, adapter):
        pauses += 1
        assert torch.is_grad_enabled()
        assert all(layer.active is None for layer in base_model.layers.values())

    assert pauses == len(TEXTS)


def test_two_calls_in_turns_give_what_one_after_the_other_gives(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)
    adapters = [random_adapter(base_model, seed=seed) for seed in (1, 2)]
    ops = [_texts_op(*TEXTS), _texts_op(*TEXTS[3:], "something else")]
    outputs = [_run(op, base_model, one) for op, one in zip(ops, adapters, strict=True)]
    after = [_taken(one) for one in adapters]

    running = [gradients.run(op, base_model, one) for op, one in zip(ops, adapters, strict=True)]
    in_turns: dict[int, LossOutput] = {}
    while len(in_turns) < 2:
        for number, slices in enumerate(running):
            if number not in in_turns:
                try:
                    next(slices)
                except StopIteration as done:
                    in_turns[number] = done.value

    for number, expected in enumerate(outputs):
        assert in_turns[number].metrics == expected.metrics
        for one, other in zip(in_turns[number].logprobs, expected.logprobs, strict=True):
            np.testing.assert_array_equal(one, other)
        _assert_equal(_taken(adapters[number]), after[number])


def test_diverged_weights_are_refused_and_leave_earlier_gradients_as_they_were(
    base_model: BaseModel, adapter: lora.Adapter
) -> None:
    before = _held(base_model, adapter)
    with torch.no_grad():
        adapter.factors["lm_head"].b.fill_(math.nan)

    with pytest.raises(UserInputError, match="diverged"):
        _run(_texts_op("a cat"), base_model, adapter)

    _assert_equal(_taken(adapter), before)


@pytest.mark.parametrize(
    ("datum", "said"),
    [
        (op_datum("a"), r"data\[1\] has 0 tokens; tinker-local/tiny takes 1 to 4096"),
        (op_datum("a" * 4098), r"data\[1\] has 4097 tokens"),
        (
            TrainingDatum(np.array([259]), dict(op_datum("ab").loss_fn_inputs)),
            r"data\[1\].model_input holds token id 259; the vocabulary has 0 to 258",
        ),
        (
            TrainingDatum(
                np.array([1]),
                {"target_tokens": np.array([-1]), "weights": np.ones(1, np.float32)},
            ),
            r"data\[1\].target_tokens holds token id -1",
        ),
    ],
)
def test_a_datum_the_model_cannot_read_is_named(
    base_model: BaseModel, datum: TrainingDatum, said: str
) -> None:
    op = ForwardBackward("any", [op_datum("fine"), datum], "cross_entropy")

    with pytest.raises(UserInputError, match=said):
        gradients.check(op, base_model)


def test_no_data_is_refused(base_model: BaseModel) -> None:
    with pytest.raises(UserInputError, match="got no data"):
        gradients.check(ForwardBackward("any", [], "cross_entropy"), base_model)
