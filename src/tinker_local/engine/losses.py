"""The arithmetic of the losses: sums over tokens, as Tinker defines them.

Of one datum with N positions, float32, in nats: lp = log p(target_tokens), q = `logprobs` (what
the sampler said), A = `advantages`, r = exp(lp - q), clip(r) = r held between the two thresholds.

    cross_entropy        -sum(weights * lp), weights 1 where none are given
    importance_sampling  -sum(r * A)
    ppo                  -sum(min(r * A, clip(r) * A))
    cispo                -sum(fixed(clip(r)) * A * lp)
    dro                  -sum(lp * A - beta / 2 * (lp - q)^2)
    gspo                 -sum(min(s_t * A, clip(s_t) * A)), s_t = fixed(s) * exp(lp - fixed(lp)),
                         s = exp(mean of lp - q where `sequence_ratio_mask` is set)

`fixed` stops the gradient. Thresholds are ratios (0.8), not distances from 1 (0.2).
A position with advantage 0 adds nothing, whatever its q; except in dro, whose quadratic term has
no mask.

Source: tinker-docs.thinkingmachines.ai, "Loss functions"; cispo's defaults: tutorial 202 of the
same; gspo with the sequence's ratio fixed: the paper's token-level form (arXiv 2507.18071,
equations 14 and 15), whose gradient equals the sequence-level one where A is constant.

Knows nothing of models: functions of log-probabilities, differentiable in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch

Inputs: TypeAlias = Mapping[str, torch.Tensor]
"""loss_fn_inputs by name, each of the shape of `target_tokens`: (N,) or (N, K)."""

Config: TypeAlias = Mapping[str, float]
"""loss_fn_config, complete: `loss_checks.complete_config` fills in the defaults."""

LossFn: TypeAlias = Callable[[torch.Tensor, Inputs, Config], torch.Tensor]
"""(log-probabilities of the shape of `target_tokens`, inputs, config) -> scalar."""

MetricsFn: TypeAlias = Callable[[torch.Tensor, Inputs, Config], Mapping[str, torch.Tensor]]
"""The same arguments -> scalars to add up over datums; every key ends in ":sum"."""


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target.

    Args:
        logits: (M, vocabulary), any float format; the softmax is taken in float32.
        targets: Token ids, (M,) or (M, K), int64.

    Returns:
        float32 in the shape of targets, in nats.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)  # (M,)
    if targets.dim() < logits.dim():
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - total
    return logits.gather(-1, targets) - total.unsqueeze(-1)


def cross_entropy(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(weights * lp), (N,) or (N, K): K weighted targets a position, as for a soft label."""
    weighted = inputs["weights"] * logprobs if "weights" in inputs else logprobs
    return -weighted.sum()


def importance_sampling(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(r * A)."""
    return -(_log_ratios(logprobs, inputs).exp() * inputs["advantages"]).sum()


def ppo(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(min(r * A, clip(r) * A)): no gradient once r has gone far enough in A's direction."""
    return _clipped_loss(_log_ratios(logprobs, inputs), inputs["advantages"], config)


def cispo(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(fixed(clip(r)) * A * lp): the clipped ratio weights the gradient, and never stops it."""
    ratios = _clip(_log_ratios(logprobs, inputs).exp(), config).detach()
    return -(ratios * inputs["advantages"] * logprobs).sum()


def dro(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(lp * A - beta / 2 * (lp - q)^2)."""
    distance = logprobs - inputs["logprobs"]
    return -(logprobs * inputs["advantages"] - 0.5 * config["beta"] * distance.square()).sum()


def gspo(logprobs: torch.Tensor, inputs: Inputs, config: Config) -> torch.Tensor:
    """-sum(min(s_t * A, clip(s_t) * A)): one ratio for the whole sequence, see the module."""
    log_ratios = _sequence_log_ratio(logprobs, inputs) + (logprobs - logprobs.detach())  # (N,)
    return _clipped_loss(log_ratios, inputs["advantages"], config)


def no_metrics(
    logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> Mapping[str, torch.Tensor]:
    return {}


def clipped_tokens(
    logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> Mapping[str, torch.Tensor]:
    """`clipped_tokens:sum`: positions with an advantage whose r lies outside the thresholds.

    A count, since counts add up over datums and chunks; a share would not.
    """
    ratios = _log_ratios(logprobs.detach(), inputs).exp()
    return {"clipped_tokens:sum": _outside(ratios, inputs["advantages"], config)}


def clipped_sequence_tokens(
    logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> Mapping[str, torch.Tensor]:
    """`clipped_tokens:sum` for gspo: positions with an advantage where s lies outside."""
    ratio = _sequence_log_ratio(logprobs, inputs).exp()
    return {"clipped_tokens:sum": _outside(ratio, inputs["advantages"], config)}


@dataclass(frozen=True)
class LossSpec:
    """What a loss is given.

    Attributes:
        function: Its arithmetic.
        inputs: loss_fn_inputs that every datum must carry.
        optional: loss_fn_inputs that are used where given. Others are ignored.
        config: Keys of loss_fn_config with their defaults; None where Tinker's default is not
            known, so that the caller must say.
        several_targets: Whether `target_tokens` may be (N, K).
        metrics: What is reported beside `loss:sum`.
    """

    function: LossFn
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: Mapping[str, float | None] = field(default_factory=lambda: MappingProxyType({}))
    several_targets: bool = False
    metrics: MetricsFn = no_metrics


_ON_SAMPLES = ("target_tokens", "logprobs", "advantages")


def _thresholds(low: float | None, high: float | None) -> Mapping[str, float | None]:
    return MappingProxyType({"clip_low_threshold": low, "clip_high_threshold": high})


LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {
        "cross_entropy": LossSpec(
            cross_entropy, ("target_tokens",), optional=("weights",), several_targets=True
        ),
        "importance_sampling": LossSpec(importance_sampling, _ON_SAMPLES),
        "ppo": LossSpec(ppo, _ON_SAMPLES, config=_thresholds(0.8, 1.2), metrics=clipped_tokens),
        "cispo": LossSpec(cispo, _ON_SAMPLES, config=_thresholds(0.0, 4.0), metrics=clipped_tokens),
        "dro": LossSpec(dro, _ON_SAMPLES, config=MappingProxyType({"beta": None})),
        "gspo": LossSpec(
            gspo,
            (*_ON_SAMPLES, "sequence_ratio_mask"),
            config=_thresholds(None, None),
            metrics=clipped_sequence_tokens,
        ),
    }
)


def _log_ratios(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """lp - q; 0 where the advantage is 0, so that a placeholder there cannot become inf * 0."""
    return torch.where(inputs["advantages"] != 0, logprobs - inputs["logprobs"], 0.0)


def _sequence_log_ratio(logprobs: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Mean of lp - q weighted by `sequence_ratio_mask`, a scalar without gradient."""
    mask = inputs["sequence_ratio_mask"]
    log_ratios = torch.where(mask != 0, logprobs.detach() - inputs["logprobs"], 0.0)
    return (mask * log_ratios).sum() / mask.sum()


def _clip(ratios: torch.Tensor, config: Config) -> torch.Tensor:
    return ratios.clamp(config["clip_low_threshold"], config["clip_high_threshold"])


def _clipped_loss(
    log_ratios: torch.Tensor, advantages: torch.Tensor, config: Config
) -> torch.Tensor:
    """-sum(min(r * A, clip(r) * A)).

    Written without torch.minimum, whose gradient through an exp that overflowed is 0 * inf = NaN
    although the loss is finite.
    """
    ratios = log_ratios.detach().exp()
    clipped = _clip(ratios, config)
    is_clipped = clipped * advantages < ratios * advantages
    is_free = (advantages != 0) & ~is_clipped
    free = torch.where(is_free, log_ratios, 0.0).exp()
    return -(torch.where(is_clipped, clipped, free) * advantages).sum()


def _outside(ratios: torch.Tensor, advantages: torch.Tensor, config: Config) -> torch.Tensor:
    is_outside = (ratios < config["clip_low_threshold"]) | (ratios > config["clip_high_threshold"])
    return (is_outside & (advantages != 0)).sum()
