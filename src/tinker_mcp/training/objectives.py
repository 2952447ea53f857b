"""How a loss is submitted and read back: by the backend's own losses here, by dpo in `dpo.py`."""

from __future__ import annotations

import math
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinker_mcp.training import losses
from tinker_mcp.training.datums import weight_sum
from tinker_mcp.training.losses import LossConfig

if TYPE_CHECKING:
    import tinker

_LOSS_SUM = "loss:sum"
_METRICS_SHOWN = 8


class Objective(Protocol):
    """A loss with its config, ready for batches of one data set."""

    @property
    def datums_a_unit(self) -> int:
        """How many datums in a row belong together."""

    def forward_backward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> Coroutine[Any, Any, tinker.ForwardBackwardOutput]:
        """Submit now; the coroutine waits for the answer."""

    async def forward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> tinker.ForwardBackwardOutput:
        """The same without a gradient."""

    def loss(self, output: tinker.ForwardBackwardOutput, datums: Sequence[tinker.Datum]) -> float:
        """What replies call the loss."""

    def metrics(self, output: tinker.ForwardBackwardOutput) -> dict[str, float]:
        """What else the loss tells."""


@dataclass(frozen=True)
class BackendLoss:
    """A loss that the backend computes."""

    loss_fn: str
    config: LossConfig
    datums_a_unit: int = 1

    def forward_backward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> Coroutine[Any, Any, tinker.ForwardBackwardOutput]:
        batch = losses.fitted(self.loss_fn, datums)
        return client.forward_backward(batch, self.loss_fn, self.config or None).coroutine()  # type: ignore[arg-type]  # checked by losses

    async def forward(
        self, client: tinker.TrainingClient, datums: Sequence[tinker.Datum]
    ) -> tinker.ForwardBackwardOutput:
        batch = losses.fitted(self.loss_fn, datums)
        answer: tinker.ForwardBackwardOutput = await client.forward(
            batch,
            self.loss_fn,  # type: ignore[arg-type]  # checked by losses
            self.config or None,
        )
        return answer

    def loss(self, output: tinker.ForwardBackwardOutput, datums: Sequence[tinker.Datum]) -> float:
        """Nats per unit of weight, or per trained token where datums have no weights."""
        weight = weight_sum(datums)
        return output.metrics[_LOSS_SUM] / weight if weight else math.nan

    def metrics(self, output: tinker.ForwardBackwardOutput) -> dict[str, float]:
        others = [name for name in output.metrics if name != _LOSS_SUM]
        return {name: output.metrics[name] for name in others[:_METRICS_SHOWN]}
