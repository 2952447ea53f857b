"""Rows that keep their prompt once, against rows that each keep all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from engine_data import random_adapter
from torch.nn import functional

from tinker_local.engine import cache, sampler
from tinker_local.engine.base_model import BaseModel
from tinker_local.engine.cache import KeyValueCache
from tinker_local.engine.next_tokens import Block, LayerState, OnCpu, OnGpu
from tinker_local.engine.sampler import Sampler
from tinker_local.ops import BaseWeights, Sample, SampledSequence, SampleOutput
from tiny_data import TINY, tokens_of

WIDTH, SCALE = 8, 0.3
CPU = torch.device("cpu")

# heads, key-value heads
HEADS = {"as many": (3, 3), "grouped": (6, 2), "one": (4, 1)}


class _Rows:
    """A cache, and beside it all keys and values of each row, (K, T, D), by themselves."""

    def __init__(self, heads: int, key_heads: int) -> None:
        self.cache = KeyValueCache()
        self.held: list[LayerState] = []
        self._sizes = (heads, key_heads)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, rows: int, tokens: int, *, is_shared: bool) -> None:
        shape = (self._sizes[1], tokens, WIDTH)
        k, v = (torch.randn(shape, generator=self._generator) for _ in range(2))
        append = self.cache.append_shared if is_shared else self.cache.append
        append([(k, v)], rows)
        self.held += [(k, v)] * rows

    def remove(self, row: int) -> None:
        for source, target in self.cache.remove(row):
            self.held[target] = self.held[source]
        self.held.pop()

    def step(self) -> None:
        """Let each row see one more token, and compare with torch's attention of it alone."""
        heads, key_heads = self._sizes
        shape = (len(self.held), heads + 2 * key_heads, WIDTH)
        new = torch.randn(shape, generator=self._generator)
        layout = self.cache.next_tokens(CPU)
        assert layout.positions.tolist() == [k.shape[1] for k, _ in self.held]
        ours = layout.attend_rows(0, new, key_heads, SCALE)
        q, k, v = torch.split(new, [heads, key_heads, key_heads], dim=1)
        for row, (keys, values) in enumerate(self.held):
            self.held[row] = (
                torch.cat([keys, k[row].unsqueeze(1)], dim=1),
                torch.cat([values, v[row].unsqueeze(1)], dim=1),
            )
            alone = functional.scaled_dot_product_attention(
                q[row].unsqueeze(1), *self.held[row], scale=SCALE, enable_gqa=True
            )
            torch.testing.assert_close(ours[row], alone[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", HEADS.values(), ids=HEADS.keys())
def test_rows_of_several_prompts_attend_as_each_does_alone(sizes: tuple[int, int]) -> None:
    rows = _Rows(*sizes)
    rows.add(3, 10, is_shared=True)
    rows.add(2, 4, is_shared=False)
    rows.add(4, 7, is_shared=True)

    for _ in range(70):  # past the 64 tokens by which buffers grow
        rows.step()


@pytest.mark.parametrize("is_shared", [True, False])
def test_rows_of_one_prompt_attend_as_each_does_alone(is_shared: bool) -> None:
    rows = _Rows(6, 2)
    rows.add(5, 9, is_shared=is_shared)

    for _ in range(3):
        rows.step()


@pytest.mark.parametrize("leaving", [0, 1, 2, 3, 4, 5, 6, 7, 8])
def test_rows_that_leave_and_join_do_not_disturb_the_others(leaving: int) -> None:
    rows = _Rows(6, 2)
    rows.add(4, 10, is_shared=True)
    rows.add(2, 3, is_shared=False)
    rows.step()
    rows.add(3, 5, is_shared=True)
    rows.step()

    rows.remove(leaving)
    rows.step()

    rows.add(2, 12, is_shared=True)
    rows.step()
    while len(rows.held) > 1:
        rows.remove(len(rows.held) // 2)
        rows.step()


@pytest.mark.parametrize("sizes", HEADS.values(), ids=HEADS.keys())
def test_the_layout_of_a_gpu_attends_as_that_of_a_cpu(sizes: tuple[int, int]) -> None:
    heads, key_heads = sizes
    lengths = [3, 0, 9, 3]
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(2, 8, key_heads, 16, WIDTH, generator=generator)
    new = torch.randn(len(lengths), heads + 2 * key_heads, WIDTH, generator=generator)
    nothing = [torch.empty(2, key_heads, 0, WIDTH)]
    on_gpu = OnGpu([buffer.clone()], lengths, CPU)  # torch's operators: they run anywhere
    on_cpu = OnCpu([buffer.clone()], lengths, [Block(slice(0, len(lengths)), nothing)])

    ours, theirs = (layout.attend_rows(0, new, key_heads, SCALE) for layout in (on_cpu, on_gpu))

    assert on_gpu.positions.tolist() == on_cpu.positions.tolist() == lengths
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(on_gpu._layers[0], on_cpu._layers[0])


def test_a_prompt_is_kept_once_from_256_saved_tokens_on() -> None:
    assert cache.is_shared(CPU, 5, 64)
    assert not cache.is_shared(CPU, 5, 63)
    assert not cache.is_shared(CPU, 1, 5000)
    assert not cache.is_shared(torch.device("cuda"), 5, 64)


def test_a_shared_prompt_takes_no_room_in_the_rows() -> None:
    rows = _Rows(3, 3)
    rows.add(5, 1000, is_shared=True)

    rows.step()

    assert rows.cache.lengths == [1] * 5
    assert rows.cache._layers[0].shape == (2, 8, 3, 64, WIDTH)


# ticket: (joins before this step, text, sequences, max_tokens)
REQUESTS: Mapping[str, tuple[int, str, int, int]] = {
    "first": (0, "the cat sat", 4, 30),
    "one sequence": (0, "a dog", 1, 20),
    "short": (3, "it is a long way, said the cat", 3, 5),
    "last": (6, "x", 2, 12),
}


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short a prompt is, two sequences share it."""
    monkeypatch.setattr(cache, "_MIN_SAVED", 1)


@pytest.fixture
def drawing(base_model: BaseModel) -> Sampler:
    return Sampler(base_model, random_adapter(base_model, rank=8, deviation=0.15, seed=0))


def _op(name: str) -> Sample:
    _, text, count, most = REQUESTS[name]
    prompt = np.array(tokens_of(text), dtype=np.int64)
    stops = list(range(0, 256, 16))  # so that sequences end at different times
    weights = BaseWeights(TINY)
    return Sample(weights, prompt, count, max_tokens=most, stop_tokens=stops, seed=3)


def _alone(model: BaseModel, name: str) -> list[SampledSequence]:
    """A request's sequences, each with the whole prompt in its own row."""
    drawing = Sampler(model, random_adapter(model, rank=8, deviation=0.15, seed=0))
    drawing.start(name, _op(name))
    return list(_finish(drawing)[name].sequences)


def _finish(drawing: Sampler) -> dict[str, SampleOutput]:
    results: dict[str, SampleOutput] = {}
    for _ in range(200):
        if drawing.is_idle:
            return results
        results |= drawing.step()
    raise AssertionError(f"{drawing.tickets} are still not done")


def _assert_same(ours: Sequence[SampledSequence], theirs: Sequence[SampledSequence]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("stopped", [None, "first", "one sequence"])
def test_requests_that_share_their_prompts_draw_what_they_draw_without(
    drawing: Sampler,
    base_model: BaseModel,
    stopped: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = {name: _alone(base_model, name) for name in REQUESTS}
    assert len({len(sequence.tokens) for sequence in alone["first"]}) > 1
    monkeypatch.setattr(cache, "_MIN_SAVED", 1)

    together: dict[str, SampleOutput] = {}
    for step in range(7):
        for name, (joins, *_) in REQUESTS.items():
            if joins == step:
                drawing.start(name, _op(name))
        if stopped is not None and step == 4:
            drawing.stop(stopped)
        together |= drawing.step()
    together |= _finish(drawing)

    assert {*REQUESTS} - {stopped} <= together.keys() | {stopped}
    for name, output in together.items():
        _assert_same(output.sequences, alone[name])


@pytest.mark.usefixtures("always_shared")
def test_more_sequences_fit_the_cache_if_they_share_their_prompt(
    drawing: Sampler, base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = np.array(tokens_of("the cat sat"), dtype=np.int64)  # 11 tokens
    op = Sample(BaseWeights(TINY), prompt, 7, max_tokens=9, stop_tokens=[], seed=5)
    # Three sequences of 20 tokens, or five of 9 and the prompt once
    monkeypatch.setattr(sampler, "_CACHE_BYTES", 60 * base_model.cache_bytes_per_token)
    drawing.start("seven", op)

    most = 0
    while not drawing.is_idle:
        drawing.step()
        most = max(most, len(drawing._rows))

    assert most == 5
