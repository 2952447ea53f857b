"""Direct preference optimization: a custom loss on pairs, against the client's frozen start.

The arithmetic is the cookbook's. What is ours: the reference log-probabilities, computed once per
client and data set by a second training client on the same start, and the care that a custom loss
needs: one that fails or is cancelled makes its client refuse every later request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tinker_mcp.training import sdk_errors
from tinker_mcp.training.clients import OpenClient, Workspace
from tinker_mcp.training.datums import DatumSet

if TYPE_CHECKING:
    import tinker
    import torch

PAIR = 2
_METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")


@dataclass(frozen=True)
class DpoLoss:
    """-log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), mean over the pairs.

    Attributes:
        references: By the datum's id(): sum of weight * log-probability at the frozen start.
    """

    beta: float
    references: Mapping[int, float]
    datums_a_unit: int = PAIR

    def forward_backward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> Coroutine[Any, Any, tinker.ForwardBackwardOutput]:
        """Submit now; the coroutine waits for the answer."""
        return _to_its_end(client.forward_backward_custom(list(datums), self.function(datums)))

    async def forward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> tinker.ForwardBackwardOutput:
        """The same numbers without a gradient, from a plain forward pass."""
        return self.scored(await client.forward(list(datums), "cross_entropy"), datums)

    def scored(
        self, output: tinker.ForwardBackwardOutput, datums: Sequence[tinker.Datum]
    ) -> tinker.ForwardBackwardOutput:
        """What a plain forward pass answered, with this loss and its metrics added."""
        import torch

        logprobs = [torch.tensor(found["logprobs"].data) for found in output.loss_fn_outputs]
        loss, metrics = self.function(datums)(list(datums), logprobs)
        output.metrics.update(metrics, **{"loss:sum": float(loss)})
        return output

    def loss(self, output: tinker.ForwardBackwardOutput, datums: Sequence[tinker.Datum]) -> float:
        """Nats a pair."""
        return float(output.metrics["dpo_loss"])

    def metrics(self, output: tinker.ForwardBackwardOutput) -> dict[str, float]:
        """Share of pairs in the right order, and rewards in units of beta * nats."""
        return {name: float(output.metrics[name]) for name in _METRICS}

    def function(
        self, datums: Sequence[tinker.Datum]
    ) -> Callable[[list[tinker.Datum], list[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]:
        """For `forward_backward_custom` of these datums: the loss, a scalar, and its metrics."""
        import torch
        from tinker_cookbook.preference.train_dpo import compute_dpo_loss

        frozen = [torch.tensor(self.references[id(datum)]) for datum in datums]  # scalars

        def dpo(
            data: list[tinker.Datum], logprobs: list[torch.Tensor]
        ) -> tuple[torch.Tensor, dict[str, float]]:
            sums = [_weighted(datum, found) for datum, found in zip(data, logprobs, strict=True)]
            chosen, rejected = slice(0, None, PAIR), slice(1, None, PAIR)
            return compute_dpo_loss(
                sums[chosen], sums[rejected], frozen[chosen], frozen[rejected], self.beta
            )

        return dpo


async def prepare(workspace: Workspace, client: OpenClient, data: DatumSet, beta: float) -> DpoLoss:
    """The loss of this client on these datums; asks for the references at the first time."""
    await anyio.to_thread.run_sync(load)
    if data.data_id not in client.references:
        client.references[data.data_id] = await _references(workspace, client, data)
    known = zip(data.datums, client.references[data.data_id], strict=True)
    return DpoLoss(beta, {id(datum): reference for datum, reference in known})


async def _references(
    workspace: Workspace, client: OpenClient, data: DatumSet
) -> tuple[float, ...]:
    # A new adapter, whatever its seed, is the base model.
    async with workspace.frozen(client) as frozen:
        with sdk_errors.told():
            output = await frozen.forward(list(data.datums), "cross_entropy")
    return references_of(output, data.datums)


def references_of(
    output: tinker.ForwardBackwardOutput, datums: Sequence[tinker.Datum]
) -> tuple[float, ...]:
    """Each datum's sum of weight * log-probability, from a forward pass of the frozen start."""
    import torch

    found = [torch.tensor(out["logprobs"].data) for out in output.loss_fn_outputs]
    return tuple(
        float(_weighted(datum, logprobs)) for datum, logprobs in zip(datums, found, strict=True)
    )


def _weighted(datum: tinker.Datum, logprobs: torch.Tensor) -> torch.Tensor:
    """Sum of weight * log-probability over the (N,) positions, a scalar."""
    return (logprobs * datum.loss_fn_inputs["weights"].to_torch()).sum()


async def _to_its_end(future: tinker.APIFuture[Any]) -> Any:
    """Its answer; whoever is cancelled while waiting does not cancel it."""
    answer = asyncio.ensure_future(_as_coroutine(future))
    answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return await asyncio.shield(answer)


async def _as_coroutine(future: tinker.APIFuture[Any]) -> Any:
    return await future


def load() -> None:
    """Import what the loss needs, in a thread: it takes seconds."""
    import tinker_cookbook.preference.train_dpo  # noqa: F401 - for its effect
