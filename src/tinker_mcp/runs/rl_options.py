"""What an rl run does beside what every run does: its options, settled, and as they were asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinker_mcp.errors import InvalidInputError

if TYPE_CHECKING:
    from tinker_mcp.runs.spec import RunSpec

RlLoss = Literal["importance_sampling", "ppo", "cispo", "dro", "gspo"]
Advantage = Literal["center", "normalize"]

MAX_GROUP_SIZE = 128  # samples a request
GROUP_SIZE = 8
MAX_TOKENS = 256
CACHED_SHARE = 0.2
"""Of the prefill price: what a token costs that was computed before, as for a group's samples."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EnvironmentSpec(_Frozen):
    """An environment: `package.module:Name`, `verifiers:NAME` or `reasoning_gym:NAME`.

    Attributes:
        args: What it is made with; what follows from the run (renderer, group_size, ...) is added.
    """

    name: str = Field(min_length=3, max_length=300)
    args: dict[str, Any] = {}


class SamplingOptions(_Frozen):
    """How a run samples.

    Attributes:
        group_size: Samples of each prompt.
        max_tokens: Of one sample; with several turns, of each.
        prefill_usd_per_million, sample_usd_per_million: None where it costs nothing.
    """

    group_size: int = Field(ge=1, le=MAX_GROUP_SIZE)
    max_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0, le=10)
    prefill_usd_per_million: float | None = None
    sample_usd_per_million: float | None = None


class RlOptions(SamplingOptions):
    """Reinforcement learning.

    Attributes:
        advantage: `center`: reward minus the group's mean; `normalize`: that, divided by the
            group's standard deviation.
        substeps: optim_steps a batch, each on its share of the samples.
        kl_coef: Of the penalty for leaving the run's start, in nats a token; 0 for none.
        max_off_policy_steps: K: a batch is sampled with weights at most so many steps old.
        reward: As `rewards.specs` has it; None where an environment brings its own.
        reward_sha256: Of the reward's file when the run was planned.
        environment: In place of prompts.
        transcripts: Samples a step that are kept.
    """

    loss_fn: RlLoss = "importance_sampling"
    loss_config: dict[str, float] = {}
    advantage: Advantage = "center"
    substeps: int = Field(1, ge=1, le=64)
    kl_coef: float = Field(0.0, ge=0, le=100)
    max_off_policy_steps: int = Field(0, ge=0, le=16)
    reward: dict[str, Any] | None = None
    reward_sha256: str | None = None
    environment: EnvironmentSpec | None = None
    transcripts: int = Field(3, ge=0, le=20)

    @model_validator(mode="after")
    def _has_one_judge(self) -> RlOptions:
        if (self.reward is None) == (self.environment is None):
            raise ValueError("give either reward or environment")
        return self


class RlArguments(_Frozen):
    """The `rl` argument of start_run; the names are those of RlOptions.

    Attributes:
        reward: The path of a Python file, or a built-in reward: an object with its `type`.
        environment: Its name, or an object with `name` and `args`.
    """

    reward: str | dict[str, Any] | None = None
    environment: str | EnvironmentSpec | None = None
    group_size: int = Field(GROUP_SIZE, ge=2, le=MAX_GROUP_SIZE)
    max_tokens: int = Field(MAX_TOKENS, ge=1, le=1_000_000)
    temperature: float = Field(1.0, gt=0, le=10)
    loss_fn: RlLoss = "importance_sampling"
    loss_config: dict[str, float] = {}
    advantage: Advantage = "center"
    substeps: int = Field(1, ge=1, le=64)
    kl_coef: float = Field(0.0, ge=0, le=100)
    max_off_policy_steps: int = Field(0, ge=0, le=16)
    transcripts: int = Field(3, ge=0, le=20)

    @property
    def environment_spec(self) -> EnvironmentSpec | None:
        """The environment, in its one form."""
        if isinstance(self.environment, str):
            return EnvironmentSpec(name=self.environment)
        return self.environment


def options_of(spec: RunSpec) -> RlOptions:
    """The options that an rl run has."""
    if spec.rl is None:
        raise InvalidInputError(
            f"The {spec.method} run {spec.name!r} has no rl options.",
            next_step="Call start_run with rl.",
        )
    return spec.rl
