"""What a run will cost: tokens as rendered, times a dated price; on the local backend, seconds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.prices import Price
from tinker_mcp.training.sessions import NewClient, in_session

if TYPE_CHECKING:
    import tinker

MEASURING_LIMIT_S = 10.0
_MEASURED_STEPS = 3
_MEASURED_TOKENS = 512  # of a step, in at most _MEASURED_DATUMS of at most _MEASURED_LENGTH
_MEASURED_DATUMS = 8
_MEASURED_LENGTH = 256
_FORWARD_SHARE = 1 / 3  # of a forward_backward: the backward pass is two matrix products a weight


@dataclass(frozen=True)
class Estimate:
    """Tokens and what they cost.

    Attributes:
        backend: `local` costs nothing.
        tokens: Billed positions by what they are for: `train`, `eval`, `references` (dpo), `total`.
        usd_low: As planned; None where the price is unknown.
        usd_high: With one crash just before a checkpoint, and derived prices at their highest.
        price: None where it is unknown, or nothing is paid.
        seconds: How long it will take on the local backend; None where that is not known.
        seconds_source: What that was measured on, or why it is not known.
    """

    backend: Literal["local", "hosted"]
    tokens: Mapping[str, int]
    usd_low: float | None
    usd_high: float | None
    price: Price | None = None
    seconds: float | None = None
    seconds_source: str = ""


@dataclass(frozen=True)
class Speed:
    """Seconds a token of a forward_backward, as measured; None where that took too long."""

    seconds_a_token: float | None
    source: str


def estimate(
    spec: RunSpec, unit_tokens: Sequence[int], price: Price | None, speed: Speed | None
) -> Estimate:
    """What a run will cost.

    Args:
        unit_tokens: Positions of each datum to train on; for dpo, of each pair.
        price: Of the model; the local backend needs none.
        speed: Of the local backend, if it was measured.
    """
    tokens = counted(spec, unit_tokens)
    if spec.backend == "local":
        seconds = _seconds(spec, tokens, speed)
        source = speed.source if speed else "not measured; estimate_cost measures it"
        return Estimate("local", tokens, 0.0, 0.0, None, seconds, source)
    if price is None:
        return Estimate("hosted", tokens, None, None)
    again = _replayed(spec, tokens)
    return Estimate(
        "hosted",
        tokens,
        usd_low=tokens["total"] * price.train / 1e6,
        usd_high=(tokens["total"] + again) * price.train_at_most / 1e6,
        price=price,
    )


def counted(spec: RunSpec, unit_tokens: Sequence[int]) -> dict[str, int]:
    """Positions that are billed, by what they are for.

    A pair's are billed twice a step, for the forward and the forward_backward of a custom loss,
    and once before the run for its references, the held-out ones' too.
    """
    trained = passes(unit_tokens, spec.batch_size, spec.steps, spec.seed)
    held_out = spec.held_out.tokens if spec.held_out else 0
    evaluated = held_out * evaluations(spec.steps, spec.eval_every) if held_out else 0
    tokens = {"train": trained, "eval": evaluated}
    if spec.method == "dpo":
        tokens = {
            "train": 2 * trained,
            "eval": evaluated,
            "references": sum(unit_tokens) + held_out,
        }
    return {**tokens, "total": sum(tokens.values())}


def passes(unit_tokens: Sequence[int], batch_size: int, steps: int, seed: int) -> int:
    """Positions of the batches of all steps, exactly as `batch_of` takes them."""
    full, rest = divmod(batch_size * steps, len(unit_tokens))
    last = batch_of(unit_tokens, len(unit_tokens), full, seed)[:rest] if rest else []
    return full * sum(unit_tokens) + sum(last)


def evaluations(steps: int, eval_every: int) -> int:
    """How often the held-out set is scored: at the start, at the end, and in between."""
    if eval_every == 0:
        return 2
    return 1 + math.ceil(steps / eval_every)


def _replayed(spec: RunSpec, tokens: Mapping[str, int]) -> float:
    """Positions that one crash just before a checkpoint costs."""
    steps = min(spec.save_every or spec.steps, spec.steps)
    return (tokens["train"] + tokens["eval"]) * steps / spec.steps


def _seconds(spec: RunSpec, tokens: Mapping[str, int], speed: Speed | None) -> float | None:
    if speed is None or speed.seconds_a_token is None:
        return None
    only_forward = tokens["eval"] + tokens.get("references", 0)
    trained = tokens["train"]
    if spec.method == "dpo":  # half of it is the forward pass of the custom loss
        trained, only_forward = trained // 2, only_forward + trained // 2
    return speed.seconds_a_token * (trained + _FORWARD_SHARE * only_forward)


def known_speed(backend: Backend, model_name: str, rank: int) -> Speed | None:
    """What was measured in this process."""
    return _speeds().get((backend.base_url, model_name, rank))


async def measured_speed(
    backend: Backend, model_name: str, rank: int, datums: Sequence[tinker.Datum]
) -> Speed:
    """What was measured in this process; else some steps are taken on a client that is thrown
    away, within MEASURING_LIMIT_S."""
    speed = known_speed(backend, model_name, rank)
    if speed is None or speed.seconds_a_token is None:
        speed = await _measure(backend, model_name, rank, datums)
        _speeds()[backend.base_url, model_name, rank] = speed
    return speed


@cache
def _speeds() -> dict[tuple[str, str, int], Speed]:
    """By backend, model and rank."""
    return {}


async def _measure(
    backend: Backend, model_name: str, rank: int, datums: Sequence[tinker.Datum]
) -> Speed:
    batch = _small(datums)
    tokens = sum(datum.model_input.length for datum in batch)
    new = NewClient(model_name, None, rank, 0, True, True, True, load_optimizer=False)
    took: list[float] = []
    try:
        async with (
            asyncio.timeout(MEASURING_LIMIT_S),
            in_session(backend, new) as client,
        ):
            for _ in range(_MEASURED_STEPS):
                began = time.monotonic()
                await _step(client, batch)
                took.append(time.monotonic() - began)
    except TimeoutError:
        pass  # what was measured until then has to do
    if not took:
        return Speed(None, f"no step ended within {MEASURING_LIMIT_S:.0f} s; the backend is busy")
    source = f"the fastest of {len(took)} measured steps of {tokens} tokens, on an idle backend"
    return Speed(min(took) / tokens, source)


async def _step(client: tinker.TrainingClient, batch: list[tinker.Datum]) -> None:
    import tinker

    gradient = client.forward_backward(batch, "cross_entropy")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-6))
    await gradient
    await stepped


def _small(datums: Sequence[tinker.Datum]) -> list[tinker.Datum]:
    """The first datums, cut short: some hundred tokens, whatever the set."""
    import tinker

    batch: list[tinker.Datum] = []
    tokens = 0
    for datum in datums[:_MEASURED_DATUMS]:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()[:_MEASURED_LENGTH].copy()
        inputs = datum.model_input.to_ints()[:_MEASURED_LENGTH]
        weights = [1.0] * len(inputs)
        batch.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(inputs),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_numpy(targets),
                    "weights": tinker.TensorData(data=weights, dtype="float32"),
                },
            )
        )
        tokens += len(inputs)
        if tokens >= _MEASURED_TOKENS:
            break
    return batch
