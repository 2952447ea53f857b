"""The contract of each loss: datums it is for, inputs it needs, config keys with their ranges.

What does not fit is refused here, before anything is sent: the SDK does not look inside a datum,
and a request that fails at the backend still lets the optim_step behind it run.

Names are those of `tinker.types.LossFnType`, without `custom` (it needs uploaded code), plus our
own `dpo`. Sources: tinker-docs.thinkingmachines.ai, "Loss functions"; cispo's defaults are those of
its tutorial 202; `kl_coeff` is the SDK's own example. Knows nothing of the arithmetic.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from tinker_mcp.errors import InvalidInputError

if TYPE_CHECKING:
    import tinker

    from tinker_mcp.training.datums import DatumKind, DatumSet

LossName = Literal[
    "cross_entropy",
    "importance_sampling",
    "ppo",
    "cispo",
    "dro",
    "gspo",
    "stable_reinforce",
    "dpo",
]
LossConfig: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class ConfigKey:
    """A number in loss_fn_config; `default` None where Tinker documents none.

    Attributes:
        is_required: There is no default, so it must be given.
        above_zero: 0 itself is out of range.
    """

    default: float | None
    is_required: bool = False
    maximum: float = 1e4
    above_zero: bool = False

    def told(self) -> str:
        """Its range and default, for an error."""
        low = "above 0" if self.above_zero else "from 0"
        default = "optional" if self.default is None else f"default {self.default:g}"
        return f"{low} up to {self.maximum:g}, {'required' if self.is_required else default}"


@dataclass(frozen=True)
class LossContract:
    """What one loss asks for.

    Attributes:
        kinds: What datums it is for.
        inputs: loss_fn_inputs that every datum must carry; nothing else is sent but `optional`.
        config: loss_fn_config by key.
        renamed: Inputs that the loss knows by another name than the datums: its name -> theirs.
        local_refusal: Why the local backend has it not; None where it has.
    """

    kinds: Sequence[DatumKind]
    inputs: Sequence[str]
    optional: Sequence[str] = ()
    config: Mapping[str, ConfigKey] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    local_refusal: str | None = None


_ON_SAMPLES = ("target_tokens", "logprobs", "advantages")


def _on_samples(
    config: Mapping[str, ConfigKey] | None = None,
    renamed: Mapping[str, str] | None = None,
    local_refusal: str | None = None,
) -> LossContract:
    return LossContract(
        kinds=("policy_gradient",),
        inputs=(*_ON_SAMPLES, *(renamed or {})),
        config=config or {},
        renamed=renamed or {},
        local_refusal=local_refusal,
    )


def _thresholds(low: float | None, high: float | None) -> Mapping[str, ConfigKey]:
    """Clip bounds, as ratios (0.8 and 1.2), not distances from 1."""
    return {
        "clip_low_threshold": ConfigKey(low, is_required=low is None),
        "clip_high_threshold": ConfigKey(high, is_required=high is None, above_zero=True),
    }


CONTRACTS: Mapping[str, LossContract] = MappingProxyType(
    {
        "cross_entropy": LossContract(
            kinds=("supervised", "text"), inputs=("target_tokens",), optional=("weights",)
        ),
        "importance_sampling": _on_samples(),
        "ppo": _on_samples(_thresholds(0.8, 1.2)),
        "cispo": _on_samples(_thresholds(0.0, 4.0)),
        "dro": _on_samples({"beta": ConfigKey(None, is_required=True)}),
        "gspo": _on_samples(_thresholds(None, None), renamed={"sequence_ratio_mask": "mask"}),
        "stable_reinforce": _on_samples(
            {"kl_coeff": ConfigKey(None)},
            local_refusal="Tinker publishes no formula for it, and it needs records that only "
            "Tinker's own sampler keeps",
        ),
        "dpo": LossContract(
            kinds=("preference",),
            inputs=("target_tokens", "weights"),
            config={"beta": ConfigKey(0.1, maximum=100, above_zero=True)},
        ),
    }
)

ADAPTED_TO: Mapping[str, str] = MappingProxyType(
    {
        "supervised": "cross_entropy",
        "text": "cross_entropy",
        "preference": "dpo",
        "policy_gradient": "importance_sampling",
    }
)
"""The plainest loss for each kind of datums."""


def check(
    loss_fn: str,
    config: Mapping[str, float] | None,
    data: DatumSet,
    datums: Sequence[tinker.Datum],
    is_local: bool,
) -> LossConfig:
    """Whether this loss can be computed on these datums; the config to use.

    Only what was given is sent, so that the backend's own defaults hold; dpo's are filled in.

    Raises:
        InvalidInputError: An unknown loss or config key, a value out of range, datums of another
            kind, or datums that lack an input.
    """
    contract = contract_of(loss_fn)
    if is_local and contract.local_refusal is not None:
        raise InvalidInputError(
            f"{loss_fn} is not served by the local backend: {contract.local_refusal}.",
            next_step="Use importance_sampling, ppo or cispo.",
        )
    complete = complete_config(loss_fn, config or {})
    if data.kind not in contract.kinds:
        raise InvalidInputError(
            f"{loss_fn} is for {' or '.join(contract.kinds)} datums, but {data.data_id} holds "
            f"{data.kind} datums.",
            next_step=f'Use loss_fn="{ADAPTED_TO[data.kind]}", or build_datums with '
            f'kind="{contract.kinds[0]}".',
        )
    _check_inputs(loss_fn, contract, data, datums)
    return complete


def contract_of(loss_fn: str) -> LossContract:
    """A loss by name.

    Raises:
        InvalidInputError: There is none of this name.
    """
    if loss_fn not in CONTRACTS:
        raise InvalidInputError(
            f"There is no loss {loss_fn!r}.{_meant(loss_fn, list(CONTRACTS))}",
            next_step=f"Use one of {', '.join(get_args(LossName))}.",
        )
    return CONTRACTS[loss_fn]


def complete_config(loss_fn: str, config: Mapping[str, float]) -> LossConfig:
    """Check loss_fn_config; dpo, which no backend computes for us, gets its defaults.

    Raises:
        InvalidInputError: An unknown or missing key, a value out of range, or a low threshold that
            is not below the high one.
    """
    known = contract_of(loss_fn).config
    for key, value in config.items():
        if key not in known:
            raise _unknown_key(loss_fn, key, known)
        _check_value(loss_fn, key, value, known[key])
    missing = [key for key, what in known.items() if what.is_required and key not in config]
    if missing:
        example = ", ".join(f'"{key}": <number>' for key in missing)
        raise InvalidInputError(
            f"{loss_fn} needs {', '.join(missing)} in loss_fn_config: Tinker documents no default.",
            next_step=f"Give loss_fn_config={{{example}}}.",
        )
    defaults = {key: what.default for key, what in known.items() if what.default is not None}
    whole = {**defaults, **config}
    low, high = whole.get("clip_low_threshold", 0.0), whole.get("clip_high_threshold", math.inf)
    if low >= high:
        raise InvalidInputError(
            f"{loss_fn}: clip_low_threshold {low:g} is not below clip_high_threshold {high:g}.",
            next_step="They are ratios, as in 0.8 and 1.2, not distances from 1.",
        )
    return whole if loss_fn == "dpo" else dict(config)


def fitted(loss_fn: str, datums: Sequence[tinker.Datum]) -> list[tinker.Datum]:
    """The datums with the loss's inputs only, under its own names for them."""
    contract = contract_of(loss_fn)
    return [_fitted(datum, contract) for datum in datums]


def _fitted(datum: tinker.Datum, contract: LossContract) -> tinker.Datum:
    import tinker

    inputs = datum.loss_fn_inputs
    names = [name for name in contract.inputs if name not in contract.renamed]
    names += [name for name in contract.optional if name in inputs]
    if len(names) == len(inputs) and not contract.renamed:
        return datum
    kept = {name: inputs[name] for name in names}
    kept |= {name: inputs[stored] for name, stored in contract.renamed.items()}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=kept)


def _check_inputs(
    loss_fn: str, contract: LossContract, data: DatumSet, datums: Sequence[tinker.Datum]
) -> None:
    for position, datum in enumerate(datums):
        length = datum.model_input.length
        for name in contract.inputs:
            stored = contract.renamed.get(name, name)
            values = datum.loss_fn_inputs.get(stored)
            if values is not None and len(values.data) == length:
                continue
            found = "lacks it" if values is None else f"has {len(values.data)} values of it"
            raise InvalidInputError(
                f"{loss_fn} needs {stored}, one value for each of the {length} positions, but "
                f"datum {position} of those chosen from {data.data_id} {found}.",
                next_step=f'Use loss_fn="{ADAPTED_TO[data.kind]}", or build the datums anew.',
            )


def _unknown_key(loss_fn: str, key: str, known: Mapping[str, ConfigKey]) -> InvalidInputError:
    if not known:
        return InvalidInputError(
            f"{loss_fn} takes no loss_fn_config, got {key!r}.",
            next_step="Leave loss_fn_config out.",
        )
    keys = "; ".join(f"{name} ({what.told()})" for name, what in known.items())
    return InvalidInputError(
        f"{loss_fn} has no {key!r} in loss_fn_config.{_meant(key, list(known))}",
        next_step=f"Its keys: {keys}.",
    )


def _check_value(loss_fn: str, key: str, value: float, known: ConfigKey) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    in_range = is_number and 0 <= value <= known.maximum  # False for NaN
    if not in_range or (known.above_zero and value == 0):
        raise InvalidInputError(
            f"{loss_fn}: {key} in loss_fn_config is {value!r}.",
            next_step=f"Give a number {known.told()}.",
        )


def _meant(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
