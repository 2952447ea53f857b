"""A file of conversations with images: what is opened, and what is refused with its line."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.training import images, messages

ANSWER = {"role": "assistant", "content": "Red."}


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "red").save(buffer, kind)
    return buffer.getvalue()


def row(source: Any, kind: str = "image") -> list[dict[str, Any]]:
    content = [{"type": kind, kind: source}, {"type": "text", "text": "Which colour?"}]
    return [{"role": "user", "content": content}, ANSWER]


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in `tmp_path`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_image_may_be_a_file_a_data_url_or_a_link(tmp_path: Path, web: str) -> None:
    (tmp_path / "red.png").write_bytes(encoded("PNG", "RGBA"))
    path = written(
        tmp_path,
        row("red.png"),
        row(data_url(encoded("JPEG"))),
        row({"url": f"{web}/red.png"}, "image_url"),
        [{"role": "user", "content": "No image."}, ANSWER],
    )

    found = images.read(path)

    opened = [conversation[0]["content"][0]["image"] for conversation in found[:3]]
    assert [(one.mode, one.size) for one in opened] == [("RGB", (40, 30))] * 3
    assert all(abs(red - 255) < 3 for red, *_ in (one.getpixel((5, 5)) for one in opened))
    assert found[3][0]["content"] == "No image."


def test_in_python_an_image_may_be_bytes_or_an_image() -> None:
    for source in (encoded("WEBP"), Image.new("L", (40, 30))):
        [message, _] = images.opened(row(source), "here", Path())
        assert message["content"][0]["image"].mode == "RGB"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a file that is not there": (lambda: row("gone.png"), "gone.png' cannot be read (No such file"),
    "a name with a zero in it": (lambda: row("a\0b"), "cannot be read"),
    "another format": (lambda: row(data_url(encoded("GIF"))), "is none of PNG, JPEG, WEBP"),
    "text": (lambda: row(data_url(b"hello")), "is none of PNG, JPEG, WEBP"),
    "half an image": (lambda: row(data_url(encoded("PNG")[:60])), "is a broken PNG"),
    "a broken data URL": (lambda: row("data:image/png;base64,@@@"), "is a broken data URL"),
    "a data URL without base64": (lambda: row("data:image/png,abc"), "no base64 in it"),
    "no source": (lambda: row(None), "names no image: 'None'"),
    "too many pixels": (
        lambda: row(data_url(encoded("PNG", "1", (6000, 6000)))),
        "6000 x 6000 pixels; 25,000,000 are the limit",
    ),
    "too many bytes": (
        lambda: row(data_url(bytes(images.MAX_BYTES + 1))),
        "20,000,001 bytes; 20,000,000 are the limit",
    ),
    "another kind of part": (lambda: row("x", "video"), "content[0] is no {type: text"),
    "a message without a role": (lambda: [{"content": "x"}], 'not an object with "role"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, case: str) -> None:
    make, told = REFUSED[case]
    path = written(tmp_path, [{"role": "user", "content": "Fine."}, ANSWER], make())

    with pytest.raises(TinkerMcpError) as caught:
        images.read(path)

    assert f"{path}, line 2: messages" in caught.value.problem
    assert told in caught.value.problem


def test_a_link_that_is_gone_is_told_without_its_signature(tmp_path: Path, web: str) -> None:
    path = written(tmp_path, row(f"{web}/gone.png?signature=secret"))

    with pytest.raises(TinkerMcpError, match=r"gone\.png cannot be fetched \(404\)") as caught:
        images.read(path)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "is empty"), ("{", "line 1 is no JSON"), ('{"text": "x"}', 'line 1 has no "messages"')],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)

    with pytest.raises(TinkerMcpError, match=told):
        images.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TinkerMcpError, match=r"none\.jsonl cannot be read"):
        images.read(tmp_path / "none.jsonl")


HOSTED = ["Qwen/Qwen3-8B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.6-35B-A3B"]


def test_a_text_model_is_refused_with_those_that_read_images() -> None:
    with pytest.raises(TinkerMcpError, match=r"Qwen3-8B reads text only\.") as caught:
        images.check_model("Qwen/Qwen3-8B", HOSTED, None)

    assert "Qwen/Qwen3.5-4B, Qwen/Qwen3.6-35B-A3B" in caught.value.next_step


def test_a_retired_model_is_refused_with_those_that_read_images() -> None:
    retired = "Qwen/Qwen3-VL-30B-A3B-Instruct"

    with pytest.raises(TinkerMcpError, match="retired it on") as caught:
        images.check_model(retired, HOSTED, None)

    assert "Qwen/Qwen3.5-4B, Qwen/Qwen3.6-35B-A3B" in caught.value.next_step


def test_a_service_without_any_such_model_leads_to_the_local_one() -> None:
    with pytest.raises(TinkerMcpError) as caught:
        images.check_model("Qwen/Qwen3-8B", ["Qwen/Qwen3-8B"], None)

    assert "tinker-local/tiny-vl" in caught.value.next_step


def test_a_tool_that_gets_an_image_names_the_script() -> None:
    found = messages.problem("line 1", row("red.png"))

    assert found is not None
    assert "content[0] is an image" in found.what
    assert "scripts/vision_training.py" in found.what


def test_a_conversation_too_long_is_refused_with_its_number() -> None:
    import tinker

    datums = [
        tinker.Datum(model_input=tinker.ModelInput.from_ints([1] * n), loss_fn_inputs={})
        for n in (4, 9)
    ]

    with pytest.raises(TinkerMcpError, match="Conversation 2 has 9 tokens"):
        images.check_lengths(datums, 8)
    images.check_lengths(datums, None)
