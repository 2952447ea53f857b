"""Conversations to tokens and weights, by the cookbook's renderers.

The tokenizer comes from the backend's own hub cache where it has one, so nothing is looked up on
the network and the user's cache stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import images, libraries, models
from tinker_mcp.training.backend import Backend

if TYPE_CHECKING:
    import tinker
    from tinker_cookbook.renderers import Message, Renderer, TrainOnWhat

_SPLIT = frozenset({"split_special_tokens"})
_SHORT = 40  # characters: headers and ends of turns


@dataclass(frozen=True)
class ModelRenderer:
    """A model's tokenizer and a renderer for it, by name."""

    model_name: str
    name: str
    tokenizer: Any
    renderer: Renderer
    hub_cache: Path | None = None

    def reading_images(self) -> ModelRenderer:
        """Itself, with a renderer that has the model's image processor. Blocks.

        Raises:
            InvalidInputError: The renderer reads text only, or there is no image processor.
        """
        if not hasattr(self.renderer, "image_processor"):
            raise InvalidInputError(
                f"The renderer {self.name} of {self.model_name} reads text only.",
                next_step="Use a model that reads images, with its recommended renderer.",
            )
        from tinker_cookbook.renderers import get_renderer

        processor = images.processor(self.model_name, self.hub_cache)
        renderer = get_renderer(
            self.name, self.tokenizer, image_processor=processor, model_name=self.model_name
        )
        return replace(self, renderer=renderer)

    def supervised(
        self, messages: Sequence[Message], train_on_what: str
    ) -> tuple[tinker.ModelInput, list[float]]:
        """Tokens (N) of a conversation and the loss weight of each (N floats, 0.0 or 1.0).

        A message with `weight` 0 (or `trainable` false) is not trained on, whatever
        `train_on_what` says.

        Raises:
            ValueError: A message has weight 0 under all_tokens, which knows no messages.
        """
        from tinker_cookbook.renderers import TrainOnWhat

        typed = _with_tool_calls(messages)
        what = TrainOnWhat(train_on_what)
        if any(map(_is_left_out, typed)):
            typed = _chosen_one_by_one(typed, what)
            what = TrainOnWhat.CUSTOMIZED
        else:
            typed = [_without_flag(message) for message in typed]
        model_input, weights = self.renderer.build_supervised_example(typed, what)
        return model_input, [float(weight) for weight in weights.tolist()]

    def prompt(self, messages: Sequence[Message]) -> tinker.ModelInput:
        """Tokens after which the assistant's answer follows."""
        return self.renderer.build_generation_prompt(_with_tool_calls(messages))

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are; ids are below it."""
        return len(self.tokenizer)

    def stop(self) -> list[str] | list[int]:
        """What ends an answer."""
        return self.renderer.get_stop_sequences()

    def answer(self, tokens: list[int]) -> tuple[str, bool]:
        """The text of a sampled answer, and whether it came to its proper end."""
        from tinker_cookbook.renderers import format_content_as_string

        message, ending = self.renderer.parse_response(tokens)
        return format_content_as_string(message["content"]), ending.is_clean

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, without a chat template."""
        tokens: list[int] = self.tokenizer.encode(text)
        return tokens

    def plain_text(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens included."""
        return str(self.tokenizer.decode(list(tokens)))


def _with_tool_calls(messages: Sequence[Message]) -> list[Message]:
    """Messages whose tool calls, objects as in OpenAI's format, are the cookbook's own type.

    Raises:
        ValueError: A tool call without a function's name and arguments (pydantic's error).
    """
    from tinker_cookbook.renderers import ToolCall

    converted: list[Message] = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            typed = [ToolCall.model_validate(call) for call in calls]
            message = {**message, "content": message["content"] or "", "tool_calls": typed}  # noqa: PLW2901
        converted.append(message)
    return converted


def _is_left_out(message: Message) -> bool:
    """By OpenAI's `weight` or the cookbook's `trainable`."""
    return message.get("weight") == 0 or message.get("trainable") is False


def _without_flag(message: Message) -> Message:
    # The renderers want the flag with CUSTOMIZED only.
    return {name: value for name, value in message.items() if name != "trainable"}  # type: ignore[return-value]


def _chosen_one_by_one(messages: Sequence[Message], what: TrainOnWhat) -> list[Message]:
    """Messages that each say whether they are trained: as `what` has it, less those left out."""
    if what == "all_tokens":
        raise ValueError("a message has weight 0, which train_on_what=all_tokens cannot honour")
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    first = {"last_assistant_message": len(messages) - 1, "last_assistant_turn": last_user + 1}
    chosen: list[Message] = []
    for index, message in enumerate(messages):
        is_meant = what == "all_messages" or (
            message["role"] == "assistant" and index >= first.get(what.value, 0)
        )
        chosen.append({**message, "trainable": is_meant and not _is_left_out(message)})
    return chosen


def load(backend: Backend, model_name: str, renderer_name: str | None) -> ModelRenderer:
    """Tokenizer and renderer of a model; `renderer_name` None takes the recommended one. Blocks.

    Raises:
        InvalidInputError: The tokenizer cannot be found, or the renderer is unknown or does not
            fit the tokenizer.
    """
    with libraries.loading():
        from tinker_cookbook.renderers import get_renderer

    tokenizer = _tokenizer(model_name, backend.hub_cache)
    name = renderer_name or str(models.renderer(model_name, lambda: tokenizer).value)
    try:
        renderer = get_renderer(name, tokenizer, model_name=model_name)
    except Exception as error:  # RendererError, or what a renderer makes of a strange tokenizer
        raise InvalidInputError(
            f"The renderer {name!r} cannot be used with {model_name}: {error}",
            next_step="Leave renderer out, or take the one list_models recommends.",
        ) from error
    return ModelRenderer(model_name, name, tokenizer, renderer, backend.hub_cache)


@lru_cache(maxsize=16)
def _tokenizer(model_name: str, hub_cache: Path | None) -> Any:
    return _quickened(_loaded_tokenizer(model_name, hub_cache))


def _quickened(tokenizer: Any) -> Any:
    """The tokenizer with an `encode` that goes straight to the Rust one where it can.

    Renderers call it thrice a message, with texts that are the same for every message among them,
    and transformers spends more on each call's options than on the text.
    """
    rust = getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        return tokenizer
    full = tokenizer.encode
    one_at_a_time = threading.RLock()  # an option is set on the Rust one, and then it is called

    def ids(text: str, split_special_tokens: bool) -> Sequence[int]:
        with one_at_a_time:
            rust.encode_special_tokens = split_special_tokens
            found: list[int] = rust.encode(text, add_special_tokens=False).ids
            return found

    short_ids = lru_cache(maxsize=4096)(ids)

    def encode(text: Any, *args: Any, add_special_tokens: bool = True, **options: Any) -> list[int]:
        split = options.get("split_special_tokens", tokenizer.split_special_tokens)
        if args or add_special_tokens or not isinstance(text, str) or options.keys() - _SPLIT:
            with one_at_a_time:
                options["add_special_tokens"] = add_special_tokens
                found: list[int] = full(text, *args, **options)
                return found
        return list((short_ids if len(text) <= _SHORT else ids)(text, split))

    full("")  # without truncation and padding, which it sets at every call
    tokenizer.encode = encode
    return tokenizer


def _loaded_tokenizer(model_name: str, hub_cache: Path | None) -> Any:
    if hub_cache is None:
        return _remote_tokenizer(model_name)
    with libraries.loading():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model_name, cache_dir=str(hub_cache), local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"The local backend has no model {model_name!r}.",
            next_step="Call list_models to see what it serves.",
        ) from error


def _remote_tokenizer(model_name: str) -> Any:
    with libraries.loading():
        from tinker_cookbook.tokenizer_utils import get_tokenizer

    try:
        return get_tokenizer(model_name)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"No tokenizer for {model_name!r}: {str(error)[:300]}",
            next_step="Check the name with list_models, and that the hub can be reached.",
        ) from error


def fitting(backend: Backend, model_name: str) -> Sequence[str]:
    """The renderers that fit a model, the recommended one first. Blocks.

    Raises:
        InvalidInputError: The tokenizer is needed and cannot be found.
    """
    return models.fitting_renderers(model_name, lambda: _tokenizer(model_name, backend.hub_cache))


def advice(backend: Backend, model_name: str) -> models.Advice | None:
    """The recommended renderer of a model and why, or None without its tokenizer. Blocks."""
    try:
        return models.renderer(model_name, lambda: _tokenizer(model_name, backend.hub_cache))
    except InvalidInputError:
        return None
