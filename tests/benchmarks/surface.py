"""What the MCP server costs a host and an agent, beside a bare one-tool server and the SDK alone.

    python -m tests.benchmarks.surface              all of it, two minutes on 2 cores
    python -m tests.benchmarks.surface --quick      does it work at all?

Starting: both servers are started as a host does it, over stdio, in turns; medians. A cold start
reads files that a second one finds in memory, so a first pair is not counted. Steps: the same
datums through MCP and by the tinker SDK in this process, in turns, on one `tinker-local serve` of
the tiny model; the number of datums makes a step last about 100 ms. The host is lines of JSON on
the server's pipes: what a host takes for itself (the mcp package's Python client a millisecond or
two a call) is not the server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import click
import psutil

if TYPE_CHECKING:
    import tinker

    from tests.servers import LocalServer

ROOT = Path(__file__).parents[2]
OURS = ("-m", "tinker_mcp", "serve")
BARE = ("-m", "tests.benchmarks.bare_server")
VISIBLE = ("name", "description", "inputSchema")  # what hosts show the model of a tool
TINY = "tinker-local/tiny"
DATUM_CHARACTERS = 128  # the tiny model's tokens are bytes
STEP_S = 0.1
LEARNING_RATE = 1e-4
HELLO = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "benchmark", "version": "0"},
}
BOUND_S = 60.0
MB = 2**20


@dataclass(frozen=True)
class Row:
    """A line of the table; a goal is the most that `ratio` or, without a ratio, `ours` may be."""

    work: str
    unit: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    goal: float | None = None

    @property
    def is_reached(self) -> bool | None:
        if self.goal is None:
            return None
        return (self.ours if self.ratio is None else self.ratio) <= self.goal


@dataclass(frozen=True)
class Start:
    """One start of a server: seconds since the spawn, bytes resident after tools/list."""

    initialize_s: float
    list_s: float
    resident_bytes: int
    tools: list[dict[str, Any]]


def start(arguments: Sequence[str], home: Path) -> Start:
    """Start a server as a host does, list its tools and end it by closing its input."""
    began = time.perf_counter()
    host = Host(arguments, home)
    try:
        initialize_s = time.perf_counter() - began
        tools = host.request("tools/list", {})["tools"]
        list_s = time.perf_counter() - began
        return Start(initialize_s, list_s, host.resident_bytes, tools)
    finally:
        host.end()


def spawned(arguments: Sequence[str], home: Path) -> subprocess.Popen[bytes]:
    """A server process as a host starts one."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=_environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _answer(
    process: subprocess.Popen[bytes], number: int, method: str, params: dict[str, Any]
) -> dict[str, Any]:
    _send(process, {"id": number, "method": method, "params": params})
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if message.get("id") == number:
            return dict(message["result"])
    raise RuntimeError(f"The server ended in {method}.")


def _send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    process.stdin.flush()


def _environment(home: Path) -> dict[str, str]:
    """Ours without what the user has set for Tinker, so that nothing but `home` is used."""
    rest = {name: value for name, value in os.environ.items() if not name.startswith("TINKER_")}
    return {**rest, "TINKER_MCP_HOME": str(home), "TINKER_TELEMETRY": "0"}


def measure_starts(rounds: int, home: Path) -> list[Row]:
    """Start both in turns; what the list of tools costs is counted in the last one."""
    pairs = [(start(OURS, home), start(BARE, home)) for _ in range(rounds + 1)][1:]
    ours, bare = (list(side) for side in zip(*pairs, strict=True))

    def row(work: str, unit: str, of: Callable[[Start], float]) -> Row:
        mine, other = (statistics.median(of(found) for found in side) for side in (ours, bare))
        return Row(work, unit, mine, other, mine / other, 1.35)

    resident, other = (
        statistics.median(found.resident_bytes / MB for found in side) for side in (ours, bare)
    )
    return [
        row("spawn to initialize", "ms", lambda found: 1e3 * found.initialize_s),
        row("spawn to tools/list", "ms", lambda found: 1e3 * found.list_s),
        Row("resident after tools/list", "MB", resident, other, goal=90),
        *_list_rows(ours[-1].tools, bare[-1].tools),
    ]


def measure_calls(rounds: int, home: Path) -> list[Row]:
    """Calls that do nothing, in turns, as far apart as a step's: the least that a call can add.

    Both servers have gone to sleep meanwhile, and waking takes longer than the call.
    """
    hosts = [Host(OURS, home), Host(BARE, home)]
    calls: list[tuple[str, dict[str, Any]]] = [("list_clients", {}), ("add", {"a": 1, "b": 2})]
    taken: list[list[float]] = [[], []]
    try:
        for _ in range(rounds + 1):
            for host, (tool, arguments), found in zip(hosts, calls, taken, strict=True):
                time.sleep(STEP_S / 2)
                began = time.perf_counter()
                host.request("tools/call", {"name": tool, "arguments": arguments})
                found.append(1e3 * (time.perf_counter() - began))
    finally:
        for host in hosts:
            host.end()
    ours, bare = (statistics.median(found[1:]) for found in taken)
    return [Row("a call that does nothing", "ms", ours, bare, ours / bare)]


def _list_rows(ours: list[dict[str, Any]], bare: list[dict[str, Any]]) -> list[Row]:
    count, how = token_counter()

    def seen(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: tool[key] for key in VISIBLE if key in tool} for tool in tools]

    return [
        Row("tools", "", len(ours), len(bare), goal=25),
        Row("the list, whole", how, count(ours), count(bare), goal=7_000),
        Row(
            "the list, as the model sees it", how, count(seen(ours)), count(seen(bare)), goal=5_000
        ),
    ]


def token_counter() -> tuple[Callable[[Any], int], str]:
    """How many tokens a value's JSON is, and by whose count."""
    from tokenizers import Tokenizer

    from tinker_local.weights import cache_dir

    pattern = "**/models--HuggingFaceTB--SmolLM2*/snapshots/*/tokenizer.json"
    found = next(iter(sorted(cache_dir().glob(pattern))), None)
    if found is None:
        return lambda value: len(_compact(value)) // 4, "characters / 4"
    tokenizer = Tokenizer.from_file(str(found))
    return lambda value: len(tokenizer.encode(_compact(value)).ids), "SmolLM2 tokens"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Host:
    """A server process, and calls of its tools by lines of JSON."""

    def __init__(self, arguments: Sequence[str], home: Path) -> None:
        self._process = spawned(arguments, home)
        self._sent = 0
        self.request("initialize", HELLO)
        _send(self._process, {"method": "notifications/initialized"})

    def request(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The result of a request."""
        self._sent += 1
        return _answer(self._process, self._sent, method, params)

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """A tool's structured reply.

        Raises:
            RuntimeError: It is an error, or has not finished.
        """
        reply = self.request("tools/call", {"name": tool, "arguments": arguments})
        found = reply.get("structuredContent")
        if reply.get("isError") or found is None or not found.get("finished", True):
            raise RuntimeError(f"{tool}: {reply['content']}")
        return dict(found)

    @property
    def resident_bytes(self) -> int:
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def end(self) -> None:
        """Close its input, and wait until it has ended."""
        with self._process as process:
            try:
                assert process.stdin is not None
                process.stdin.close()
                process.wait(BOUND_S)
            finally:
                process.kill()


class ThroughMcp:
    """forward_backward and optim_step as an agent calls them."""

    def __init__(self, host: Host, texts: list[str]) -> None:
        self._host = host
        opened = host.call("create_training_client", base_model=TINY, seed=0)
        rows = [{"text": text} for text in texts]
        built = host.call("build_datums", base_model=TINY, conversations=rows, kind="text")
        self._client_id = opened["client_id"]
        self._data_id = built["data_id"]

    async def in_turn(self) -> None:
        self._host.call("forward_backward", client_id=self._client_id, data_id=self._data_id)
        self._host.call("optim_step", client_id=self._client_id, learning_rate=LEARNING_RATE)

    async def together(self) -> None:
        optim = {"learning_rate": LEARNING_RATE}
        handles = {"client_id": self._client_id, "data_id": self._data_id}
        self._host.call("forward_backward", **handles, optim=optim)


class SdkAlone:
    """The same by the tinker SDK."""

    def __init__(self, client: tinker.TrainingClient, texts: list[str]) -> None:
        import tinker

        self._client = client
        self._data = [_datum(text) for text in texts]
        self._adam = tinker.AdamParams(learning_rate=LEARNING_RATE)

    async def in_turn(self) -> None:
        await self._client.forward_backward(self._data, "cross_entropy")
        await self._client.optim_step(self._adam)

    async def together(self) -> None:
        scored = self._client.forward_backward(self._data, "cross_entropy")
        stepped = self._client.optim_step(self._adam)
        await scored
        await stepped


def _datum(text: str) -> tinker.Datum:
    import tinker

    tokens = list(text.encode())
    inputs = {
        "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        "weights": tinker.TensorData(
            data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]
        ),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


async def measure_steps(rounds: int, home: Path) -> list[Row]:
    """Take the same steps on both sides, in turns."""
    async with _both_sides(home) as (host, trainer):
        count = await _datums_a_step(trainer)
        texts = _texts(count)
        mcp, sdk = ThroughMcp(host, texts), SdkAlone(trainer, texts)
        two = await _taken([mcp.in_turn, sdk.in_turn], rounds)
        one = await _taken([mcp.together, sdk.together], rounds)
    return [
        *_compared(f"step of {count} datums, two calls", "what MCP adds, a call", two, calls=2),
        *_compared("step with optim, one call", "what MCP adds, a call with optim", one, calls=1),
    ]


def _compared(work: str, added: str, taken: list[list[float]], calls: int) -> list[Row]:
    """Medians of both sides, and those of the ratios and differences of neighbours.

    The machine's speed drifts by more in a minute than what is looked for, hardly in 0.2 s.
    """
    ours, alone = map(statistics.median, taken)
    pairs = list(zip(*taken, strict=True))
    ratio = statistics.median(mine / other for mine, other in pairs)
    adds = statistics.median(mine - other for mine, other in pairs) / calls
    return [Row(work, "ms", ours, alone, ratio, 1.05), Row(added, "ms", adds, goal=10)]


@contextlib.asynccontextmanager
async def _both_sides(home: Path) -> AsyncIterator[tuple[Host, tinker.TrainingClient]]:
    import tinker

    from tests.servers import start_server

    backend: LocalServer = start_server(home / "local", model=TINY)
    try:
        with tinker.ServiceClient(base_url=backend.base_url, api_key=backend.api_key) as service:
            trainer = await service.create_lora_training_client(TINY, rank=32, seed=0)
            host = Host(OURS, home)
            try:
                yield host, trainer
            finally:
                host.end()
    finally:
        backend.stop()


async def _datums_a_step(trainer: tinker.TrainingClient) -> int:
    """How many datums make a step of about STEP_S, measured on the SDK's side."""
    count = 8
    for _ in range(4):  # the time a datum falls as there are more of them
        (found,) = await _taken([SdkAlone(trainer, _texts(count)).in_turn], 5)
        count = max(1, round(count * 1e3 * STEP_S / statistics.median(found)))
    return count


def _texts(count: int) -> list[str]:
    """So many different texts of DATUM_CHARACTERS."""
    return [
        (f"{number:06d} " + "the loss falls. " * 20)[:DATUM_CHARACTERS] for number in range(count)
    ]


async def _taken(sides: Sequence[Callable[[], Awaitable[None]]], rounds: int) -> list[list[float]]:
    """Milliseconds of each, taken in turns, now one first and now the other; the first round is
    not counted.
    """
    taken: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        in_turn = list(zip(sides, taken, strict=True))
        for side, found in in_turn if number % 2 else reversed(in_turn):
            began = time.perf_counter()
            await side()
            found.append(1e3 * (time.perf_counter() - began))
    return [found[1:] for found in taken]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice(["start", "step"]), help="Only this half.")
@click.option("--quick", is_flag=True, help="Few rounds, which say nothing about the goals.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(only: str | None, quick: bool, json_file: Path | None) -> None:
    """Measure what the MCP server costs and print a table."""
    began = time.perf_counter()
    os.environ.update(TINKER_TELEMETRY="0", HF_HUB_OFFLINE="1")  # before the SDK is imported
    starts, steps = (2, 3) if quick else (7, 150)
    with tempfile.TemporaryDirectory(prefix="tinker-mcp-benchmark-") as room:
        home = Path(room)
        rows = [] if only == "step" else measure_starts(starts, home)
        rows += [] if only == "start" else measure_calls(steps, home)
        rows += [] if only == "start" else anyio.run(measure_steps, steps, home)
    seconds = time.perf_counter() - began
    click.echo(_report(rows, starts, steps, seconds))
    if json_file:
        record = {
            "rounds": {"starts": starts, "steps": steps},
            "rows": [{**asdict(row), "is_reached": row.is_reached} for row in rows],
            "seconds": seconds,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def _report(rows: Sequence[Row], starts: int, steps: int, seconds: float) -> str:
    table = [("work", "unit", "ours", "other", "ratio", "goal", ""), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_line(cells, widths) for cells in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(
        [
            "",
            *lines,
            "",
            "other: of a start, the list and a call, a bare one-tool server on the same MCP SDK; "
            "of a step, the tinker SDK alone.",
            f"medians of {starts} starts and {steps} steps, in turns; of a step, those of "
            f"neighbours' ratios and differences; {seconds:.0f} s in all.",
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    goal = "" if row.goal is None else f"{row.goal:,g}{'x' if row.ratio is not None else ''}"
    verdict = {None: "", True: "reached", False: "missed"}[row.is_reached]
    return (row.work, row.unit, number(row.ours), number(row.other), ratio, goal, verdict)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    is_text = (True, True, False, False, False, False, True)
    padded = [
        cell.ljust(width) if left else cell.rjust(width)
        for cell, width, left in zip(cells, widths, is_text, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


if __name__ == "__main__":
    main()
