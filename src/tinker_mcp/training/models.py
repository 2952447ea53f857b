"""What is known of a model: its renderer and its learning rate, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message

SWEEP_LEARNING_RATE = 3e-4
SWEEP_SOURCE = (
    "best for 14 of 27 models in Tinker's supervised sweep at batch size 128 (LoRA); "
    "1e-3 for 10 others; 72 of 80 runs at 3e-3 diverged"
)

# Renderers tried on a model that the cookbook does not know, most specific first.
_CANDIDATES = ("qwen3_instruct", "llama3", "qwen3", "qwen3_5", "deepseekv3")
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
    from tinker_cookbook.hyperparam_utils import get_lr

    if _is_in_cookbook(model_name):
        try:
            return Advice(get_lr(model_name), "tinker_cookbook.hyperparam_utils.get_lr")
        except (NotImplementedError, ValueError):
            pass  # not calibrated for this family
    return Advice(SWEEP_LEARNING_RATE, SWEEP_SOURCE)


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
    for name in _CANDIDATES:
        if _rendered(name, tokenizer) == template:
            return Advice(name, "equals the model's chat template token for token")
    return Advice(_FALLBACK, "no renderer equals the model's chat template")


def _is_in_cookbook(model_name: str) -> bool:
    """Whether the cookbook has facts on the model; asking it for others looks on the network."""
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
