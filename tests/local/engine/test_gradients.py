from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinker_local.engine import batches, checkpoints, gradients, lora
from tinker_local.engine.base_model import BaseModel
from tinker_local.errors import UserInputError
from tinker_local.ops import ForwardBackward, LoraSpec, LossOutput, TrainingDatum
from tiny_data import cross_entropy_op, op_datum

TEXTS = ("the cat sat", "a", "dogs run far away from here", "on the mat", "it is", "x y z")


@pytest.fixture
def adapter(base_model: BaseModel) -> lora.Adapter:
    """An adapter whose B is not zero, so that A has a gradient too."""
    adapter = lora.new_adapter(base_model.layers, LoraSpec(rank=4, seed=0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.b.normal_(0, 0.05, generator=generator)
    return adapter


def _run(op: ForwardBackward, model: BaseModel, adapter: lora.Adapter) -> LossOutput:
    gradients.check(op, model)
    with lora.active(model.layers, adapter):
        return gradients.run(op, model, adapter.parameters())


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

    with lora.active(base_model.layers, adapter), torch.no_grad():
        our_logits = base_model.logits(base_model.hidden_states(tokens[:, :-1]))
    torch.testing.assert_close(our_logits, logits.detach(), atol=1e-5, rtol=0)
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
    monkeypatch.setattr(gradients, "_HEAD_TOKENS", 5)
    pieces = _run(_texts_op(*TEXTS), base_model, adapter)

    assert pieces.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-6)
    _assert_close(_taken(adapter), gradients_of_whole, atol=1e-5)


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


def test_a_call_that_fails_midway_leaves_earlier_gradients_as_they_were(
    base_model: BaseModel, adapter: lora.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(_texts_op("a cat"), base_model, adapter)
    before = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    # Longest first, so the good datum's gradient is there when the bad one's shape fails.
    bad = TrainingDatum(
        np.array([97]),
        {"target_tokens": np.array([97, 98]), "weights": np.ones(1, np.float32)},
    )
    op = ForwardBackward("any", [op_datum("a longer one"), bad], "cross_entropy")
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 1)

    with (
        pytest.raises((RuntimeError, ValueError)),
        lora.active(base_model.layers, adapter),
    ):
        gradients.run(op, base_model, adapter.parameters())

    assert all(torch.equal(a, b) for a, b in zip(_taken(adapter), before, strict=True))


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
