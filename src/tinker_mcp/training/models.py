"""What is known of a model: its renderer and its learning rate, each with its source."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinker_mcp.training import libraries

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message

SWEEP_LEARNING_RATE = 3e-4
SWEEP_SOURCE = (
    "best for 14 of 27 models in Tinker's supervised sweep at batch size 128 (LoRA); "
    "1e-3 for 10 others; 72 of 80 runs at 3e-3 diverged"
)

RL_LEARNING_RATE = 4e-5
RL_SOURCE = "tinker_cookbook.recipes.rl_basic; the cookbook's others have 1e-5 to 3e-5"
DPO_LEARNING_RATE = 1e-5
DPO_SOURCE = "the default of tinker_cookbook.preference.train_dpo"

DISTILL_LEARNING_RATE = 1e-4
DISTILL_SOURCE = "the default of tinker_cookbook.recipes.distillation.on_policy_distillation"

RETIRED_ON = "2026-06-12"
RETIREMENTS_SOURCE = "https://tinker-docs.thinkingmachines.ai/tinker/model-deprecations/"
# As that page recommended in November 2026.
REPLACEMENTS: Mapping[str, str] = {
    "Qwen/Qwen3.5-35B-A3B": "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3.5-27B": "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3-30B-A3B": "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "Qwen/Qwen3.6-35B-A3B",
}
# Retired on the same day; these are only the nearest in size of those served in October 2026.
NEAREST: Mapping[str, str] = {
    "Qwen/Qwen3-30B-A3B-Base": "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3-32B": "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3-235B-A22B-Instruct-2507": "Qwen/Qwen3.5-397B-A17B",
    "Qwen/Qwen3-4B-Instruct-2507": "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "Qwen/Qwen3.6-35B-A3B",
    "Qwen/Qwen3-VL-235B-A22B-Instruct": "Qwen/Qwen3.5-397B-A17B",
    "meta-llama/Llama-3.1-8B": "Qwen/Qwen3-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "Qwen/Qwen3-8B",
    "meta-llama/Llama-3.1-70B": "Qwen/Qwen3.6-35B-A3B",
    "meta-llama/Llama-3.2-1B": "Qwen/Qwen3.5-4B",
    "meta-llama/Llama-3.2-3B": "Qwen/Qwen3.5-4B",
    "meta-llama/Llama-3.3-70B-Instruct": "Qwen/Qwen3.6-35B-A3B",
}

# Renderers tried on a model that the cookbook does not know, most specific first.
_CANDIDATES = ("qwen3_instruct", "llama3", "qwen3", "qwen3_5", "deepseekv3")
_VISION_CANDIDATES = ("qwen3_vl_instruct", "qwen3_vl")  # where the template shows images
_FALLBACK = "role_colon"
_PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
]


@dataclass(frozen=True)
class Advice:
    """A recommended value and where it comes from."""

    value: str | float
    source: str


def learning_rate(model_name: str) -> Advice:
    """A LoRA learning rate to start from: the cookbook's formula, else its sweep's favourite."""
    with libraries.loading():
        from tinker_cookbook.hyperparam_utils import get_lr

    if _is_in_cookbook(model_name):
        try:
            return Advice(get_lr(model_name), "tinker_cookbook.hyperparam_utils.get_lr")
        except (NotImplementedError, ValueError):
            pass  # not calibrated for this family
    return Advice(SWEEP_LEARNING_RATE, SWEEP_SOURCE)


def dpo_learning_rate() -> Advice:
    """A learning rate to start DPO from, whatever the model."""
    return Advice(DPO_LEARNING_RATE, DPO_SOURCE)


def rl_learning_rate() -> Advice:
    """A learning rate to start reinforcement learning from, whatever the model."""
    return Advice(RL_LEARNING_RATE, RL_SOURCE)


def distill_learning_rate() -> Advice:
    """A learning rate to start on-policy distillation from, whatever the model."""
    return Advice(DISTILL_LEARNING_RATE, DISTILL_SOURCE)


def absent(model_name: str, served: Sequence[str]) -> tuple[str, str]:
    """What to say of a model that a backend does not serve, and what to take instead.

    Args:
        served: What it does serve, which alone says what exists.
    """
    problem = f"{model_name!r} is not among the {len(served)} models that can be trained here"
    replacement = REPLACEMENTS.get(model_name)
    nearest = NEAREST.get(model_name)
    if replacement or nearest:
        problem += f": Tinker retired it on {RETIRED_ON}"
    close = difflib.get_close_matches(model_name, served, n=3, cutoff=0.6) or list(served)[:3]
    fix = f"Use one that is served, such as {', '.join(close)} (list_models has all)."
    if replacement in served:
        fix = f'Use base_model="{replacement}", its replacement by {RETIREMENTS_SOURCE}.'
    elif nearest in served:
        fix = f'Use base_model="{nearest}", which is the nearest in size; see {RETIREMENTS_SOURCE}.'
    elif replacement or nearest:
        fix = f"On the hosted service {replacement or nearest} takes its place. Here: {fix}"
    return problem, fix


def fitting_renderers(model_name: str, load_tokenizer: Callable[[], Any]) -> Sequence[str]:
    """The renderers that fit a model, the recommended one first."""
    recommended = str(renderer(model_name, load_tokenizer).value)
    if not _is_in_cookbook(model_name):
        return (recommended,)
    from tinker_cookbook.model_info import get_recommended_renderer_names

    return (recommended, *get_recommended_renderer_names(model_name))


def renderer(model_name: str, load_tokenizer: Callable[[], Any]) -> Advice:
    """The renderer that fits a model; its tokenizer is loaded only if it must be looked at.

    For a model the cookbook does not know, the one that reproduces the tokenizer's own chat
    template token for token; `role_colon` where none does.
    """
    if _is_in_cookbook(model_name):
        from tinker_cookbook.model_info import get_recommended_renderer_name

        return Advice(get_recommended_renderer_name(model_name), "tinker_cookbook.model_info")
    tokenizer = load_tokenizer()
    if getattr(tokenizer, "chat_template", None) is None:
        return Advice(_FALLBACK, "the tokenizer has no chat template")
    template = _template_tokens(tokenizer)
    shows_images = "<|image_pad|>" in str(tokenizer.chat_template)
    for name in (*_VISION_CANDIDATES, *_CANDIDATES) if shows_images else _CANDIDATES:
        if _rendered(name, tokenizer) == template:
            return Advice(name, "equals the model's chat template token for token")
    return Advice(_FALLBACK, "no renderer equals the model's chat template")


def _is_in_cookbook(model_name: str) -> bool:
    """Whether the cookbook has facts on the model; asking it for others looks on the network."""
    with libraries.loading():
        from tinker_cookbook.exceptions import ConfigurationError
        from tinker_cookbook.model_info import get_model_attributes

    try:
        get_model_attributes(model_name)
    except (ConfigurationError, KeyError, ValueError):
        return False
    return True


def _template_tokens(tokenizer: Any) -> list[int]:
    text = tokenizer.apply_chat_template(_PROBE, add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def _rendered(name: str, tokenizer: Any) -> list[int] | None:
    from tinker_cookbook.renderers import get_renderer

    try:
        prompt = get_renderer(name, tokenizer).build_generation_prompt(_PROBE)
        return list(prompt.to_ints())
    except Exception:  # a renderer raises whatever it likes for a tokenizer without its tokens
        return None
