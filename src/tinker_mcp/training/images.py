"""Conversations with images: a file of them, opened and checked, and the models that read them.

A message's content is text or a list of parts, in the layouts of the cookbook and of OpenAI:
{"type": "text", "text": ...}, {"type": "image", "image": SOURCE},
{"type": "image_url", "image_url": {"url": SOURCE}}. SOURCE is the path of a file, relative to the
folder of the data, a data URL (base64) or an http(s) URL; in Python also bytes or a PIL image.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.training import messages as checks
from tinker_mcp.training import models

if TYPE_CHECKING:
    import tinker
    from PIL.Image import Image

MAX_BYTES = 20_000_000
MAX_PIXELS = 25_000_000
FORMATS = ("PNG", "JPEG", "WEBP")  # sent as JPEG, whatever they were

_FETCH_TIMEOUT_S = 30.0
_COLOURS = ("red", "green", "blue", "yellow")
_IMAGE_PARTS = ("image", "image_url")


def read(path: Path) -> list[list[dict[str, Any]]]:
    """The conversations of a JSONL file, {"messages": [...]} a line, with their images opened.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: A line is no such conversation, or an image of it cannot be used.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise NotFoundError(
            f"{path} cannot be read: {error.strerror}.", next_step="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path} is not UTF-8 text.", next_step="Give JSON Lines, one conversation a line."
        ) from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InvalidInputError(f"{path} is empty.", next_step="Give one conversation a line.")
    return [
        opened(_messages(line, f"{path}, line {n}"), f"{path}, line {n}", path.parent)
        for n, line in rows
    ]


def opened(messages: Any, place: str, folder: Path) -> list[dict[str, Any]]:
    """Messages whose images are PIL images in RGB, as the cookbook's renderers take them.

    Args:
        place: How an error calls them.
        folder: Relative paths start here.

    Raises:
        InvalidInputError: They are no conversation, or an image cannot be used.
    """
    if problem := checks.problem(place, _without_images(messages)):
        raise InvalidInputError(f"{problem}.", next_step="Mend that row.")
    found = []
    for index, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list):
            content = [
                _opened_part(part, f"{place}: messages[{index}].content[{number}]", folder)
                for number, part in enumerate(content)
            ]
        found.append({**message, "content": content})
    return found


def picture(source: Any, place: str, folder: Path) -> Image:
    """An image in RGB, loaded whole.

    Args:
        source: A PIL image, bytes, or text as the module's docstring has it.
        place: How an error calls it.
        folder: Relative paths start here.

    Raises:
        InvalidInputError: It cannot be had, is in another format, broken, or too large.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.convert("RGB")
    data = source if isinstance(source, bytes) else _bytes(source, place, folder)
    if len(data) > MAX_BYTES:
        raise InvalidInputError(
            f"{place} has {len(data):,} bytes; {MAX_BYTES:,} are the limit.",
            next_step="Scale it down or compress it: a model sees a megapixel or two at most.",
        )
    try:
        with warnings.catch_warnings():  # of a decompression bomb; the limit below is lower
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInputError(
            f"{place} is none of {', '.join(FORMATS)} ({error}).",
            next_step="Convert it: PIL.Image.open(path).save('image.png').",
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidInputError(
            f"{place} has {width} x {height} pixels; {MAX_PIXELS:,} are the limit.",
            next_step="Scale it down: image.thumbnail((2048, 2048)).",
        )
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInputError(
            f"{place} is a broken {image.format}: {error}.",
            next_step="Copy or download the image again, or leave the row out.",
        ) from error


def check_lengths(datums: Sequence[tinker.Datum], max_length: int | None) -> None:
    """Refuse conversations that are too long: cut, they would lose the reply, or half an image.

    Raises:
        InvalidInputError: The first one of more than `max_length` tokens.
    """
    for number, datum in enumerate(datums, 1):
        length = datum.model_input.length
        if max_length is not None and length > max_length:
            raise InvalidInputError(
                f"Conversation {number} has {length} tokens with its images'; {max_length} are "
                "the limit.",
                next_step="Scale its images down, shorten it, or leave it out.",
            )


def coloured_shapes(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Conversations for a trial: a circle or a square of one colour, and what it is."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)  # noqa: S311 - pictures, no secrets
    found: list[list[dict[str, Any]]] = []
    for _ in range(count):
        colour, shape = rng.choice(_COLOURS), rng.choice(("circle", "square"))
        image = Image.new("RGB", (96, 96), "black")
        left, top, size = rng.randint(0, 30), rng.randint(0, 30), rng.randint(45, 60)
        pen = ImageDraw.Draw(image)
        draw = pen.ellipse if shape == "circle" else pen.rectangle
        draw((left, top, left + size, top + size), fill=colour)
        question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        user = {"role": "user", "content": question}
        found.append([user, {"role": "assistant", "content": f"a {colour} {shape}"}])
    return found


def reading_models(served: Sequence[str], hub_cache: Path | None) -> list[str]:
    """Those of the served models that read images.

    Args:
        hub_cache: The local backend's, which has the image processors of its own; None for the
            hosted service, of whose models the cookbook knows.
    """
    return [name for name in served if _reads_images(name, hub_cache)]


def check_model(base_model: str, served: Sequence[str], hub_cache: Path | None) -> None:
    """Refuse a model that reads no images, with those that do.

    Raises:
        InvalidInputError: It is not served, or reads text only.
    """
    able = reading_models(served, hub_cache)
    if base_model in able:
        return
    what = f"{base_model} reads text only"
    if base_model not in served:
        what, _ = models.absent(base_model, served)
    here = f"Use --base-model with one that reads images: {', '.join(able)}."
    nowhere = (
        "No model of this backend reads images. Use the local one (unset TINKER_API_KEY), whose "
        "tinker-local/tiny-vl does; it is served unless TINKER_LOCAL_MODELS leaves it out."
    )
    raise InvalidInputError(f"{what}.", next_step=here if able else nowhere)


@lru_cache(maxsize=8)
def processor(model_name: str, hub_cache: Path | None) -> Any:
    """A model's image processor, which counts an image's tokens. Blocks.

    Raises:
        InvalidInputError: It cannot be found.
    """
    try:
        if hub_cache is None:
            from tinker_cookbook.image_processing_utils import get_image_processor

            return get_image_processor(model_name)
        # Not transformers' own name for it, which asks for torchvision.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        load: Any = AutoImageProcessor.from_pretrained
        return load(model_name, cache_dir=str(hub_cache), local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        raise InvalidInputError(
            f"No image processor for {model_name!r}: {str(error).strip()[:300]}",
            next_step="Use a model that reads images, and see that the hub can be reached.",
        ) from error


def _messages(line: str, place: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            f"{place} is no JSON: {error}.", next_step="Write one JSON object a line."
        ) from error
    if not isinstance(row, Mapping) or "messages" not in row:
        raise InvalidInputError(
            f'{place} has no "messages".',
            next_step='Write {"messages": [{"role": "user", "content": [...]}, ...]}.',
        )
    return row["messages"]


def _without_images(messages: Any) -> Any:
    """The same with a word in each image's place, for the checks of a conversation's shape."""
    if not isinstance(messages, list):
        return messages
    return [
        {**message, "content": [_word(part) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _word(part: Any) -> Any:
    return {"type": "text", "text": "image"} if _is_image(part) else part


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _IMAGE_PARTS


def _opened_part(part: Any, place: str, folder: Path) -> Any:
    if not _is_image(part):
        return part
    source = part.get(part["type"])
    if isinstance(source, Mapping):
        source = source.get("url")
    return {"type": "image", "image": picture(source, place, folder)}


def _bytes(source: Any, place: str, folder: Path) -> bytes:
    if not isinstance(source, str) or not source:
        raise InvalidInputError(
            f"{place} names no image: {str(source)[:60]!r}.",
            next_step="Give a file's path, a data URL or an http(s) URL.",
        )
    if source.startswith("data:"):
        return _decoded(source, place)
    if source.startswith(("http://", "https://")):
        return _fetched(source, place)
    path = folder / Path(source).expanduser()
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{place}: the image file {str(path)[:300]!r} cannot be read "
            f"({getattr(error, 'strerror', None) or error}).",
            next_step="Paths are relative to the data's folder: correct this one, or add the file.",
        ) from error


def _decoded(url: str, place: str) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("no base64 in it")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InvalidInputError(
            f"{place} is a broken data URL ({error}).",
            next_step="Write data:image/png;base64, and the file's bytes in base64.",
        ) from error


def _fetched(url: str, place: str) -> bytes:
    """At most a byte more than MAX_BYTES."""
    import httpx

    data = b""
    try:
        with httpx.stream("GET", url, timeout=_FETCH_TIMEOUT_S, follow_redirects=True) as answer:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > MAX_BYTES:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        shown = url.partition("?")[0][:200]  # what follows may be a signature
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        raise InvalidInputError(
            f"{place}: {shown} cannot be fetched ({status}).",
            next_step="Check the link, or download the images once and name the files.",
        ) from error
    return data


def _reads_images(name: str, hub_cache: Path | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if hub_cache is None:
        from tinker_cookbook.exceptions import ConfigurationError
        from tinker_cookbook.model_info import get_model_attributes

        try:
            return bool(get_model_attributes(name).is_vl)
        except (ConfigurationError, KeyError, ValueError):
            pass  # of another server, which has set HF_HOME

    found = try_to_load_from_cache(name, "preprocessor_config.json", cache_dir=hub_cache)
    return isinstance(found, str)
