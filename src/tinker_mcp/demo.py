"""`tinker-mcp demo`: the main job, done as an agent would do it.

It starts the server as a subprocess, connects with a real MCP client over stdio, and uses tools
only: check, build datums, measure, sample, train, measure, sample, save, sample what was saved.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.settings import BackendChoice

QUESTION = "What is the capital of Portugal?"  # not among the 128 conversations
EVAL_SHARE = 0.125  # 16 of the cookbook's 128 conversations
BATCH_SIZE = 8
LEARNING_RATE = 1e-3


class DemoError(TinkerMcpError):
    """A tool answered with an error."""

    code = "demo"


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; losses in nats a token on conversations never trained on."""

    base_model: str
    backend: str
    steps: int
    eval_loss_before: float
    eval_loss_after: float
    answer_before: str
    answer_after: str
    answer_of_checkpoint: str
    checkpoint: str
    seconds: float

    @property
    def has_improved(self) -> bool:
        return self.eval_loss_after < self.eval_loss_before


def run_demo(backend: BackendChoice, *, as_json: bool, steps: int, base_model: str | None) -> int:
    """Run it and print what came out.

    Returns:
        The exit status: 0 if the held-out loss fell, 1 if it did not or a tool failed.
    """
    console = Console(stderr=as_json)
    try:
        result = anyio.run(_run, console, backend, steps, base_model)
    except DemoError as error:
        console.print(f"[red]The demo failed.[/red] {error}", highlight=False)
        return 1
    if as_json:
        print(json.dumps({**asdict(result), "has_improved": result.has_improved}))  # noqa: T201 - --json
    else:
        _show(console, result)
    return 0 if result.has_improved else 1


class Agent:
    """The calls of the demo, each a tool call that must succeed; waits until it is finished."""

    def __init__(self, client: Client, console: Console) -> None:
        self._client = client
        self._console = console

    async def call(self, tool: str, description: str, **arguments: Any) -> dict[str, Any]:
        """Call `tool` until it is finished, with a progress bar.

        Raises:
            DemoError: The tool answered with an error.
        """
        with _progress(self._console) as bar:
            task = bar.add_task(description, total=None)

            async def on_progress(
                progress: float, total: float | None, message: str | None
            ) -> None:
                text = message or description
                bar.update(task, completed=progress, total=total, description=text)

            while True:
                reply = await self._client.call_tool(tool, arguments, progress_callback=on_progress)
                if not reply.is_error and (reply.structured_content or {}).get("finished", True):
                    break
                text = getattr(reply.content[0], "text", "")
                if reply.is_error and not text.startswith("backend_starting"):
                    raise DemoError(f"{tool}: {text}", next_step="")
                bar.update(task, description=f"{description} (still working)")
            bar.update(task, completed=1, total=1, description=description)
        return dict(reply.structured_content or {})


async def _run(
    console: Console, backend: BackendChoice, steps: int, base_model: str | None
) -> DemoResult:
    outcome: DemoResult | DemoError
    async with _connected(backend) as client:
        # Caught inside: the connection's task group would wrap it.
        try:
            outcome = await _fine_tune(Agent(client, console), steps, base_model)
        except DemoError as error:
            outcome = error
    if isinstance(outcome, DemoError):
        raise outcome
    return outcome


async def _fine_tune(agent: Agent, steps: int, base_model: str | None) -> DemoResult:
    began = time.monotonic()
    await agent.call("check_setup", "checking the set-up")
    listed = await agent.call("list_models", "starting the backend")
    base = base_model or listed["models"][0]["name"]
    data = await agent.call(
        "build_datums",
        "building datums from 128 conversations",
        path=str(_conversations()),
        base_model=base,
        eval_share=EVAL_SHARE,
    )
    opened = await agent.call(
        "create_training_client", "opening a training client", base_model=base, seed=0
    )
    client_id = opened["client_id"]
    measure = {
        "client_id": client_id,
        "data_id": data["eval_data_id"],
        "forward_only": True,
    }
    before = await agent.call("forward_backward", "held-out loss before", **measure)
    asked = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 64,
    }
    answer_before = await agent.call("sample", "sampling before", base_model=base, **asked)
    await agent.call(
        "train",
        "training",
        client_id=client_id,
        data_id=data["data_id"],
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
    )
    after = await agent.call("forward_backward", "held-out loss after", **measure)
    answer_after = await agent.call("sample", "sampling after", client_id=client_id, **asked)
    saved = await agent.call(
        "save_checkpoint", "saving a checkpoint", client_id=client_id, name="demo"
    )
    answer_saved = await agent.call(
        "sample", "sampling the checkpoint", checkpoint=saved["sampler"], **asked
    )
    return DemoResult(
        base_model=base,
        backend=saved["backend"],
        steps=steps,
        eval_loss_before=before["loss"],
        eval_loss_after=after["loss"],
        answer_before=answer_before["samples"][0]["text"],
        answer_after=answer_after["samples"][0]["text"],
        answer_of_checkpoint=answer_saved["samples"][0]["text"],
        checkpoint=saved["sampler"],
        seconds=round(time.monotonic() - began, 1),
    )


@asynccontextmanager
async def _connected(backend: BackendChoice) -> AsyncIterator[Client]:
    """An MCP client on a server of its own, whose log goes nowhere: errors come as replies."""
    folder = str(_conversations().parent)
    arguments = ["-m", "tinker_mcp", "serve", "--backend", backend, "--root", folder]
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))
    with Path(os.devnull).open("w") as nowhere:  # noqa: ASYNC230 - a null device never blocks
        async with Client(stdio_client(parameters, errlog=nowhere)) as client:
            yield client


def _conversations() -> Path:
    """The cookbook's example conversations."""
    return Path(str(resources.files("tinker_cookbook") / "example_data" / "conversations.jsonl"))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _show(console: Console, result: DemoResult) -> None:
    table = Table(title=f"{result.base_model} on {result.backend}, {result.steps} steps")
    table.add_column("")
    table.add_column("before")
    table.add_column("after")
    table.add_row(
        "held-out loss (nats a token)",
        f"{result.eval_loss_before:.3f}",
        f"{result.eval_loss_after:.3f}",
    )
    table.add_row(QUESTION, result.answer_before, result.answer_after)
    console.print(table)
    console.print(f"Checkpoint: {result.checkpoint}", soft_wrap=True, highlight=False)
    console.print(f"It answers: {result.answer_of_checkpoint}", highlight=False)
    verdict = "fell" if result.has_improved else "did not fall"
    console.print(f"The held-out loss {verdict}. {result.seconds:.0f} s in all.", highlight=False)
