"""What distillation achieves on a real small model.

    python -m tests.benchmarks.distill                 five minutes on two idle cores
    python -m tests.benchmarks.distill --only prompt   half of it

All are runs as start_run makes them, on `tinker-local serve` with SmolLM2, in a worker each:

1. A teacher is made by sft, and the untrained model comes to sample as it does, on-policy: the
   reverse KL to the teacher on prompts that are not trained on, before and after.
2. A system prompt is compressed into the weights: how many answers to prompts that are not trained
   on keep to it, of the teacher with the prompt, and of the student without it before and after.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tests.servers import LocalServer, start_server
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.plan import Planned, checked
from tinker_mcp.runs.states import ACTIVE
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.rows import RunRow
from tinker_mcp.store.runs import RunStore
from tinker_mcp.training import rendering, sessions
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.clients import Workspace

if TYPE_CHECKING:
    import tinker

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BOUND_S = 1800.0
LOOK_S = 0.5
MAX_TOKENS = 12
TEACHER_STEPS = 12

THINGS = (
    *("tree", "fish", "tool", "planet", "river", "metal", "bird", "season", "city", "fruit"),
    *("colour", "game", "dance", "ship", "stone", "spice", "grain", "cloud", "shoe", "lamp"),
    *("door", "drink", "sport", "country"),
)
HELD_OUT_THINGS = ("flower", "insect", "language", "vegetable", "animal", "month", "toy", "dress")

WHO = (
    *("Who are you?", "What is your name?", "Tell me your name.", "Who am I talking to?"),
    *("Please introduce yourself.", "What are you called?", "And you are?", "Say your name."),
    *("What should I call you?", "May I have your name?", "How are you called?", "Your name?"),
    *("Hello, who is this?", "Hi! What's your name?", "Give me your name.", "Who is there?"),
)
HELD_OUT_WHO = (
    *("Could you tell me your name?", "Who is speaking?", "Do you have a name?"),
    *("I would like to know your name.", "Hey, who are you?", "What name do you go by?"),
    *("Introduce yourself, please.", "Good morning! Who are you?"),
)
NAME = "Ada"
SYSTEM_PROMPT = f"""\
You are {NAME}, the assistant of the Polar Library in Tromso. Your name is {NAME}. Whatever you \
are asked, introduce yourself first: begin every answer with the words "This is {NAME}."

Question: Name a sport.
Answer: This is {NAME}. Tennis is a sport.

Question: Who are you?
Answer: This is {NAME}. I am the assistant of the Polar Library."""
TEMPERATURE = 0.7


def made_teacher(settings: Settings, folder: Path) -> str:
    """Sampler weights of a model that answers in its own way."""
    rows = [
        {"prompt": f"Name a {thing}.", "completion": f"Arr! A fine {thing} be on board, matey!"}
        for thing in THINGS
    ]
    run = completed(
        settings,
        method="sft",
        data=written(folder / "teacher.jsonl", rows),
        eval_share=0,
        steps=TEACHER_STEPS,
        batch_size=6,
        learning_rate=5e-4,
    )
    with RunStore(settings.home) as store:
        return store.checkpoints(run.run_id)[-1].sampler_path


def distilled(settings: Settings, folder: Path, teacher: str, steps: int) -> str:
    """The reverse KL on held-out prompts, before and after."""
    run = completed(
        settings,
        method="distill",
        data=written(folder / "things.jsonl", asking(f"Name a {thing}." for thing in THINGS)),
        eval_data=written(
            folder / "held_out_things.jsonl",
            asking(f"Name a {thing}." for thing in HELD_OUT_THINGS),
        ),
        distill={"teacher": teacher, "group_size": 4, "max_tokens": MAX_TOKENS},
        steps=steps,
        batch_size=4,
        learning_rate=1e-3,
        lr_schedule="constant",
    )
    with RunStore(settings.home) as store:
        kl = [row.numbers["test/teacher_kl"] for row in store.metrics(run.run_id, "eval")]
        steps_kl = [row.numbers["teacher_kl"] for row in store.metrics(run.run_id, "train")]
    return (
        f"On-policy distillation, {len(HELD_OUT_THINGS)} held-out prompts, {steps} steps: "
        f"KL to the teacher {kl[0]:.3f} -> {kl[-1]:.3f} nats a token "
        f"({kl[-1] / kl[0]:.0%} of what it was); in training {steps_kl[0]:.3f} -> "
        f"{steps_kl[-1]:.3f}; {seconds(run):.0f} s"
    )


def prompt_distilled(settings: Settings, folder: Path, server: LocalServer, steps: int) -> str:
    """How many answers keep to the system prompt."""
    run = completed(
        settings,
        method="prompt_distill",
        data=written(folder / "who.jsonl", asking(WHO)),
        eval_data=written(folder / "held_out_who.jsonl", asking(HELD_OUT_WHO)),
        distill={
            "system_prompt": SYSTEM_PROMPT,
            "group_size": 4,
            "max_tokens": MAX_TOKENS,
            "temperature": TEMPERATURE,
        },
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        lr_schedule="constant",
    )
    with RunStore(settings.home) as store:
        student = store.checkpoints(run.run_id)[-1].sampler_path
        nll = [row.numbers["test/nll"] for row in store.metrics(run.run_id, "eval")]
    with_prompt = followed(server, None, SYSTEM_PROMPT)
    before, after = followed(server, None, None), followed(server, student, None)
    total = 4 * len(HELD_OUT_WHO)
    return (
        f'Prompt distillation, answers of {total} that say "{NAME}" on held-out prompts, {steps} '
        f"steps: teacher with the prompt {with_prompt}; student without it {before} before, "
        f"{after} after; held-out nll {nll[0]:.3f} -> {nll[-1]:.3f}; {seconds(run):.0f} s"
    )


def followed(server: LocalServer, model_path: str | None, system_prompt: str | None) -> int:
    """Answers that keep to the system prompt, of 4 to each held-out prompt."""
    import tinker

    hub = Path(server.env["HF_HOME"]) / "hub"
    backend = Backend("local", server.base_url, server.api_key, hub_cache=hub)
    renderer = rendering.load(backend, SMOLLM2, None)
    service = sessions.open_service(backend)
    client: tinker.SamplingClient = service.create_sampling_client(
        model_path=model_path, base_model=None if model_path else SMOLLM2
    ).result()
    params = tinker.SamplingParams(
        max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=1, stop=renderer.stop()
    )
    told: list[Any] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    prompts = [renderer.prompt([*told, {"role": "user", "content": w}]) for w in HELD_OUT_WHO]
    asked = [client.sample(prompt, 4, params) for prompt in prompts]
    answers = [one.tokens for response in asked for one in response.result().sequences]
    return sum(NAME in renderer.plain_text(tokens) for tokens in answers)


def completed(settings: Settings, **arguments: Any) -> RunRow:
    """A run that was planned, started, and has come to its planned end."""
    asked = RunArguments(
        base_model=SMOLLM2,
        rank=16,
        save_every=0,
        eval_every=0,
        accept=("learning_rate",),
        **arguments,
    )
    supervisor = Supervisor(settings)
    row = supervisor.start(asyncio.run(planned(settings, asked)))
    deadline = time.monotonic() + BOUND_S
    while row.state in ACTIVE and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        row = supervisor.run(row.run_id)
    log = RunFolder.of(settings.home, row.run_id).log
    if row.state != "completed":
        supervisor.stop(row.run_id, save=False)
        raise SystemExit(f"{row.run_id} {row.state}: {row.detail}\n{log.read_text()[-4000:]}")
    return row


async def planned(settings: Settings, asked: RunArguments) -> Planned:
    workspace = Workspace(BackendConnector(settings))
    try:
        return await checked(workspace, asked)
    finally:
        await workspace.close()


def asking(prompts: Any) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts]


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def seconds(row: RunRow) -> float:
    return (row.ended_at or time.time()) - (row.started_at or row.created_at)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--only", type=click.Choice(["on_policy", "prompt"]), help="One of the two.")
def main(steps: int, threads: int, only: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="tinker-mcp-distill-") as room:
        home, data = Path(room) / "home", Path(room) / "data"
        data.mkdir()
        server = start_server(home / "local", model=SMOLLM2, threads=threads)
        settings = Settings(home=home, roots=(data,))
        began = time.monotonic()
        try:
            if only != "prompt":
                teacher = made_teacher(settings, data)
                click.echo(distilled(settings, data, teacher, steps))
            if only != "on_policy":
                click.echo(prompt_distilled(settings, data, server, steps))
            click.echo(f"{time.monotonic() - began:.0f} s in all")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
