"""The cookbook's training programs on SmolLM2, each against a fresh `tinker-local serve`.

    python -m tests.benchmarks.cookbook                      all of it, 25 minutes on 2 cores
    python -m tests.benchmarks.cookbook --only sft,dpo       some
    python -m tests.benchmarks.cookbook --steps 2            does it work at all?

Shows that programs which nobody here wrote run and learn, and what a step of theirs costs, their
own work included. tests/stories/test_cookbook_recipes.py asserts the same of the tiny model.

    sft         supervised.train on the 128 conversations that the cookbook ships
    rl          rl.train on recipes.math_rl's arithmetic
    rl-async    the same, sampling while it trains
    dpo         preference.train_dpo on 8 comparisons
    distill     distillation.train_on_policy; its teacher is what an `sft` made before it
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from tests.cookbook_recipes import Finished, Plan, run_recipe
from tests.servers import LocalServer, start_server

RECIPE_BOUND_S = 3600.0
KL = "optim/kl_sample_train_v2"


@dataclass(frozen=True)
class Measured:
    """What to run, and which metric tells whether it learned."""

    plan: Plan
    metric: str


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        step_s: Mean duration of a step, with the recipe's checkpoints and evaluations.
        first: The metric in the first step; with many steps the mean of the first quarter.
        last: The same at the end.
        kl: Highest mean divergence of sampler and trainer of a step, None where none is told.
    """

    recipe: str
    steps: int
    step_s: float
    metric: str
    first: float
    last: float
    kl: float | None


def _measured(model: str, steps: int | None) -> dict[str, Measured]:
    """The settings by recipe; `log_path` is filled in later."""
    plans = {
        "sft": Plan("sft", model, "", 12, batch_size=8, max_tokens=512, learning_rate=5e-4),
        "rl": Plan(
            *("rl", model, "", 10),
            **{"batch_size": 8, "group_size": 8, "max_tokens": 8, "learning_rate": 1e-4},
        ),
        "rl-async": Plan(
            *("rl-async", model, "", 10),
            **{"batch_size": 8, "group_size": 8, "max_tokens": 8, "learning_rate": 1e-4},
        ),
        "dpo": Plan("dpo", model, "", 8, batch_size=8, max_tokens=512, learning_rate=1e-4),
        "distill": Plan(
            *("distill", model, "", 10),
            **{"batch_size": 4, "group_size": 4, "max_tokens": 24, "learning_rate": 2e-4},
        ),
    }
    metrics = {
        "sft": "train_mean_nll",
        "rl": "env/all/reward/total",
        "rl-async": "env/all/reward/total",
        "dpo": "dpo_loss",
        "distill": "teacher_kl",
    }
    return {
        name: Measured(replace(plan, rank=32, steps=steps or plan.steps), metrics[name])
        for name, plan in plans.items()
    }


def measure(name: str, measured: Measured, server: LocalServer, room: Path) -> Row:
    """Run one recipe against `server`.

    Raises:
        AssertionError: It failed; holds the end of what it said.
    """
    plan = replace(measured.plan, log_path=str(room / name))
    if name == "distill":
        plan = replace(plan, teacher=_teacher(plan.model, server, room))
    return _row(name, run_recipe(plan, server.env, RECIPE_BOUND_S), measured.metric)


def _teacher(model: str, server: LocalServer, room: Path) -> str:
    """Sampler weights of a model that was trained on the conversations."""
    plan = replace(_measured(model, None)["sft"].plan, log_path=str(room / "teacher"))
    path: str = run_recipe(plan, server.env, RECIPE_BOUND_S).checkpoints[-1]["sampler_path"]
    return path


def _row(name: str, finished: Finished, metric: str) -> Row:
    values = finished.series(metric)
    ends = max(1, len(values) // 4)
    divergences = finished.series(KL)
    return Row(
        name,
        steps=len(finished.steps),
        step_s=finished.seconds / len(finished.steps),
        metric=metric,
        first=statistics.mean(values[:ends]),
        last=statistics.mean(values[-ends:]),
        kl=max(divergences, default=None),
    )


def _print(rows: Iterable[Row]) -> None:
    line = "{:<9} {:>5} {:>7}  {:<21} {:>8} {:>8} {:>9}".format
    click.echo(line("recipe", "steps", "s/step", "metric", "first", "last", "max KL"))
    for row in rows:
        kl = "-" if row.kl is None else f"{row.kl:.5f}"
        ends = f"{row.first:.4f}", f"{row.last:.4f}"
        click.echo(line(row.recipe, row.steps, f"{row.step_s:.1f}", row.metric, *ends, kl))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--only", help="Recipes by name, separated by commas.")
@click.option("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--threads", type=click.IntRange(1), help="Of the server.  [default: the CPUs]")
@click.option("--steps", type=click.IntRange(1), help="Of each recipe, instead of its own number.")
def main(only: str | None, model: str, dtype: str, threads: int | None, steps: int | None) -> None:
    measured = _measured(model, steps)
    names = only.split(",") if only else list(measured)
    if unknown := [name for name in names if name not in measured]:
        raise click.BadParameter(f"{', '.join(unknown)}: it knows {', '.join(measured)}.")

    rows, failures = [], []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="tinker-local-cookbook-") as folder:
            room = Path(folder)
            server = start_server(
                *(room / "state", "--dtype", dtype),
                model=model,
                threads=threads or os.cpu_count() or 1,
            )
            try:
                rows.append(measure(name, measured[name], server, room))
            except AssertionError as error:
                failures.append(f"{name} failed:\n{error}")
            finally:
                server.stop()
        click.echo(f"{name} done", err=True)
    _print(rows)
    if failures:
        click.echo("\n\n".join(failures), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
