"""How far the policy that is trained is from the one that sampled, and from a third one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker

    from tinker_mcp.runs.journal import Journal

KL_ALARM = 0.01
"""Nats a token, `optim/kl_sample_train_v2`: healthy below (Tinker's documentation)."""


@dataclass
class KlAlarm:
    """Warns once of samples that come from another policy than the one that learns from them."""

    journal: Journal
    max_off_policy_steps: int
    temperature: float
    substeps: int = 1
    _has_rung: bool = False

    def look(self, kl: float, step: int) -> None:
        """Take the KL between sampler and trainer at a step."""
        if kl <= KL_ALARM or self._has_rung:
            return
        self._has_rung = True
        self.journal.warn(
            f"The KL between sampler and trainer was {kl:.3g} at step {step}, above {KL_ALARM}: "
            f"the samples come from another policy than the one that learns from them "
            f"({self._why()}). A lower learning_rate helps."
        )

    def _why(self) -> str:
        causes = {
            f"max_off_policy_steps is {self.max_off_policy_steps}": self.max_off_policy_steps > 0,
            f"substeps is {self.substeps}": self.substeps > 1,
            f"temperature is {self.temperature:g}": self.temperature != 1,
        }
        found = [cause for cause, holds in causes.items() if holds]
        return ", ".join(found) or "the sampler and the trainer do not agree"


class CookbookScorer:
    """A sampling client as the cookbook's KL penalties call it.

    The client's own method of that name warns that it is old.
    """

    def __init__(self, client: tinker.SamplingClient) -> None:
        self._client = client

    async def compute_logprobs_async(self, prompt: tinker.ModelInput) -> list[float | None]:
        logprobs: list[float | None] = await self._client.compute_logprobs(prompt)
        return logprobs
