"""What a distillation does beside what every run does: its options, settled, and as asked."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinker_mcp.runs.rl_options import MAX_GROUP_SIZE, MAX_TOKENS, SamplingOptions

Mode = Literal["on_policy", "off_policy"]

GROUP_SIZES: dict[Mode, int] = {"on_policy": 4, "off_policy": 1}  # the cookbook's recipes have 4
MAX_PROMPT_CHARACTERS = 200_000


class DistillOptions(SamplingOptions):
    """Distillation. `prefill_` and `sample_usd_per_million` are prices of the student.

    Attributes:
        mode: `on_policy`: the student samples and the teacher scores; `off_policy`: the teacher
            samples once, and the student learns its answers as in sft.
        teacher_base_model: The teacher, or what `teacher_checkpoint` was trained from.
        teacher_checkpoint: Its sampler weights; None takes the base model itself.
        teacher_renderer: What it is asked through, off-policy; on-policy it scores the student's
            own tokens.
        has_same_tokenizer: Whether the teacher's tokens are the student's.
        group_size: Samples of each prompt, the student's or the teacher's.
        system_prompt: What the teacher is told before each prompt, and the student is not.
        kl_coef: Advantage of a token, a nat of reverse KL.
        kl_discount: How much of a later token's advantage a token has as well.
        max_off_policy_steps: K: a batch is sampled with weights at most so many steps old.
        transcripts: Samples a step that are kept.
    """

    mode: Mode
    teacher_base_model: str
    teacher_checkpoint: str | None = None
    teacher_renderer: str
    has_same_tokenizer: bool = True
    teacher_prefill_usd_per_million: float | None = None
    teacher_sample_usd_per_million: float | None = None
    system_prompt: str | None = None
    kl_coef: float = Field(1.0, gt=0, le=100)
    kl_discount: float = Field(0.0, ge=0, le=1)
    max_off_policy_steps: int = Field(0, ge=0, le=16)
    transcripts: int = Field(3, ge=0, le=20)

    @model_validator(mode="after")
    def _can_score(self) -> DistillOptions:
        if self.mode == "on_policy" and not self.has_same_tokenizer:
            raise ValueError("on_policy needs a teacher with the student's tokenizer")
        return self

    @property
    def of_teacher(self) -> SamplingOptions:
        """The same for what the teacher samples."""
        return SamplingOptions(
            group_size=self.group_size,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            prefill_usd_per_million=self.teacher_prefill_usd_per_million,
            sample_usd_per_million=self.teacher_sample_usd_per_million,
        )


class DistillArguments(BaseModel):
    """The `distill` argument of start_run; the names are those of DistillOptions.

    Attributes:
        teacher: A base model, or the path of sampler weights (tinker://...); prompt_distill takes
            the run's own base model where none is given.
        mode: Of distill; `on_policy` by default. prompt_distill is off-policy.
        group_size: 4 on-policy, 1 off-policy by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    teacher: str | None = Field(None, min_length=1, max_length=1000)
    mode: Mode | None = None
    system_prompt: str | None = Field(None, min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    group_size: int | None = Field(None, ge=1, le=MAX_GROUP_SIZE)
    max_tokens: int = Field(MAX_TOKENS, ge=1, le=1_000_000)
    temperature: float = Field(1.0, gt=0, le=10)
    kl_coef: float = Field(1.0, gt=0, le=100)
    kl_discount: float = Field(0.0, ge=0, le=1)
    max_off_policy_steps: int = Field(0, ge=0, le=16)
    transcripts: int = Field(3, ge=0, le=20)
