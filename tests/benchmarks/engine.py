"""Speed and memory of our backend beside a plain transformers + peft loop, measured in one run.

    python -m tests.benchmarks.engine                       all of it, 11 minutes on 2 cores
    python -m tests.benchmarks.engine --only sft,sample     some
    python -m tests.benchmarks.engine --quick               does it work at all? a minute

Same model, LoRA rank, data, number format and threads on both sides; both are warmed up, take
turns, and count the best of their rounds (other work on the machine only ever makes a round
slower). Ours is measured through the tinker SDK against `tinker-local serve`, HTTP included; the
plain loop in its own process, without any transport. A workload that fails prints its error, and
the next one follows. On a CPU: a GPU is hidden from both.

    ours.py, plain.py   the two sides          measure.py   what is done with them
    sides.py            what they share        workloads.py the data
    machine.py          matrix multiply peak, FLOP a token, peak memory
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # both load torch
    from tests.benchmarks.measure import TrainingResult
    from tests.benchmarks.sides import Setup
    from tests.benchmarks.workloads import Batch, Workloads

MB = 2**20
PEAK_GOAL_PERCENT = 50


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        other: The plain loop's figure, or that of the second way in `work`.
        ratio: How much better ours is (1.0 the same); None where there is no comparison.
        goal: What should be reached, in words; empty for none.
    """

    work: str
    unit: str
    ours: float
    other: float | None = None
    ratio: float | None = None
    goal: str = ""
    is_reached: bool | None = None


@dataclass(frozen=True)
class Run:
    """What every workload gets."""

    setup: Setup
    workloads: Workloads
    repeat: int | None
    peaks: dict[str, float]  # FLOP/s by number format

    def rounds(self, default: int) -> int:
        return self.repeat or default


def _peak(run: Run) -> list[Row]:
    """The machine's own matrix multiply; measured again here, the better one counts."""
    from tests.benchmarks.machine import SIZE, matmul_flops

    for dtype in run.peaks:
        found = matmul_flops(dtype, run.setup.threads)
        run.peaks[dtype] = max(run.peaks[dtype], found)
    return [
        Row(f"matrix multiply {SIZE}^3, {dtype}", "GFLOP/s", flops / 1e9)
        for dtype, flops in run.peaks.items()
    ]


def _sft(run: Run) -> list[Row]:
    from tests.benchmarks import measure

    batches = run.workloads.supervised
    count = run.workloads.sizes.conversations
    # The last batch warms up. A batch of another size is slower when it comes for the first time:
    # with 128 conversations four batches take turns in six rounds.
    result = measure.training(run.setup, batches[-1], batches, run.rounds(6))
    *rows, nominal, needed = _training_rows(f"SFT, {count} conversations", result, run, (3.0, 2.0))
    is_reached = nominal.ours >= PEAK_GOAL_PERCENT
    return [*rows, replace(nominal, goal=f"{PEAK_GOAL_PERCENT} %", is_reached=is_reached), needed]


def _rl(run: Run) -> list[Row]:
    from tests.benchmarks import measure

    sizes = run.workloads.sizes
    result = measure.training(
        run.setup, run.workloads.rl_warm_up, [run.workloads.rl], run.rounds(2)
    )
    return _training_rows(
        f"RL, {sizes.groups} groups of {sizes.group_size}", result, run, (5.0, None)
    )


def _training_rows(
    work: str, result: TrainingResult, run: Run, goals: tuple[float, float | None]
) -> list[Row]:
    speed_goal, memory_goal = goals
    speed = result.tokens_per_s
    rows = [_times(work, "tokens/s", speed.ours, speed.plain, speed_goal)]
    ours_bytes, plain_bytes = result.peak_bytes
    if ours_bytes and plain_bytes:
        ours_mb, plain_mb = ours_bytes / MB, plain_bytes / MB
        ratio = plain_mb / ours_mb
        rows.append(
            Row(f"{work}: peak memory", "MB", ours_mb, plain_mb, *_judged(ratio, memory_goal))
        )
    return rows + _utilisation_rows(work, result, run)


def _utilisation_rows(work: str, result: TrainingResult, run: Run) -> list[Row]:
    """Percent of the matrix multiply peak: of all work in the data, and of what is needed of it."""
    from tests.benchmarks.machine import training_flops
    from tests.benchmarks.sides import RANK

    _peak(run)  # again, close to what it is compared with
    peak = run.peaks[run.setup.dtype]
    flops = training_flops(run.setup.model_folder, RANK)
    speeds = (result.tokens_per_s.ours, result.tokens_per_s.plain or 0.0)

    def percent(needed: Callable[[Batch], float]) -> tuple[float, float]:
        pairs = zip(speeds, result.fastest_batches, strict=True)
        ours, plain = (100 * speed * needed(b) / b.tokens / peak for speed, b in pairs)
        return ours, plain

    def least(batch: Batch) -> float:
        return batch.distinct_tokens * flops.body + batch.counted_tokens * flops.head

    nominal = percent(lambda batch: batch.tokens * flops.nominal)
    needed = percent(least)
    return [
        Row(f"{work}: of the peak, nominal", "%", *nominal),
        Row(f"{work}: of the peak, needed", "%", *needed),
    ]


def _sample(run: Run) -> list[Row]:
    from tests.benchmarks import measure

    goals = {1: 2.0, 8: 4.0, 32: 5.0}
    new_tokens = run.workloads.sizes.new_tokens
    return [
        _times(
            f"sampling {count} x {new_tokens}", "tokens/s", pair.ours, pair.plain, goals.get(count)
        )
        for count, pair in measure.sampling(run.setup, run.workloads, run.rounds(3)).items()
    ]


def _clients(run: Run) -> list[Row]:
    from tests.benchmarks import measure

    pair = measure.clients(run.setup, run.workloads, run.rounds(1))
    work = f"{run.workloads.sizes.clients} clients at once / in turn"
    return [_times(work, "tokens/s", pair.ours, pair.plain, 5.0)]


def _mixed(run: Run) -> list[Row]:
    from tests.benchmarks import measure

    result = measure.mixed(run.setup, run.workloads)
    return [
        _times(f"{name} while {other} / alone", "tokens/s", pair.ours, pair.plain, 0.3)
        for name, other, pair in (
            ("training", "sampling", result.training),
            ("sampling", "training", result.sampling),
        )
    ]


def _times(work: str, unit: str, ours: float, other: float | None, goal: float | None) -> Row:
    return Row(work, unit, ours, other, *_judged(ours / other if other else None, goal))


def _judged(ratio: float | None, goal: float | None) -> tuple[float | None, str, bool | None]:
    """A row's ratio, goal and whether it is reached."""
    if goal is None or ratio is None:
        return ratio, "", None
    return ratio, f"{goal:g}x", ratio >= goal


MEASUREMENTS: dict[str, Callable[[Run], list[Row]]] = {
    "sft": _sft,
    "rl": _rl,
    "sample": _sample,
    "clients": _clients,
    "mixed": _mixed,
    "peak": _peak,  # its own lines; the others measure it too
}


def _chosen(context: click.Context, option: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in MEASUREMENTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(MEASUREMENTS)}.")
    return [name for name in MEASUREMENTS if name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", callback=_chosen, default=",".join(MEASUREMENTS), show_default=True)
@click.option("--model", default=None, help="What `tinker-local serve --model` takes.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    help="Of the base weights.  [default: what the server picks]",
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=os.cpu_count() or 1, show_default=True
)
@click.option(
    "--plain-training",
    type=click.Choice(["autocast", "default"]),
    default="autocast",
    show_default=True,
    help="In bfloat16, whether the plain loop trains under torch.autocast; peft's default "
    "multiplies its adapters in float32, which is slower.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    help="Timed rounds, of which the best counts.  [default: 3; rl 2, clients 1]",
)
@click.option("--quick", is_flag=True, help="Small sizes, which say nothing about the goals.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path))
def main(
    only: list[str],
    model: str | None,
    dtype: str | None,
    threads: int,
    plain_training: str,
    repeat: int | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure tinker-local beside a plain transformers + peft loop and print a table."""
    began = time.perf_counter()
    # By default a signal would leave the servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rounds = repeat or (1 if quick else None)
    run = _prepared(model, dtype, threads, plain_training, rounds, quick=quick)
    rows: list[Row] = []
    errors: dict[str, str] = {}
    for name in only:
        click.echo(f"[{time.perf_counter() - began:4.0f} s] {name} ...", err=True)
        try:
            found = MEASUREMENTS[name](run)
            rows += found
            click.echo("\n".join(" ".join(filter(None, _cells(row))) for row in found), err=True)
        except Exception as error:  # a workload that cannot be measured must not hide the others
            traceback.print_exc()
            errors[name] = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
    seconds = time.perf_counter() - began
    click.echo(_report(run, rows, errors, seconds))
    if json_file:
        json_file.write_text(json.dumps(_record(run, rows, errors, seconds), indent=1) + "\n")


def _prepared(
    model: str | None,
    dtype: str | None,
    threads: int,
    plain_training: str,
    repeat: int | None,
    *,
    quick: bool,
) -> Run:
    """Find the model, render the data and take the machine's peak."""
    # Before torch, transformers or the SDK is imported, and for the processes started from here.
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        TINKER_TELEMETRY="0",
        TOKENIZERS_PARALLELISM="false",
    )
    from tests.benchmarks import workloads
    from tests.benchmarks.machine import matmul_flops
    from tests.benchmarks.sides import Setup
    from tinker_local.engine.hardware import pick_device, pick_dtype
    from tinker_local.weights import DEFAULT_MODEL, cache_dir, resolve_model, stderr_progress

    spec = model or DEFAULT_MODEL
    files = resolve_model(spec, cache_dir(), progress=stderr_progress)
    chosen = dtype or str(pick_dtype("auto", pick_device())).removeprefix("torch.")
    return Run(
        Setup(
            files.name,
            files.folder,
            chosen,
            threads,
            has_autocast=chosen == "bfloat16" and plain_training == "autocast",
        ),
        workloads.make(files.folder, workloads.QUICK if quick else workloads.FULL),
        repeat,
        {name: matmul_flops(name, threads) for name in ("bfloat16", "float32")},
    )


def _report(run: Run, rows: Sequence[Row], errors: dict[str, str], seconds: float) -> str:
    from tests.benchmarks.machine import training_flops
    from tests.benchmarks.sides import RANK

    flops = training_flops(run.setup.model_folder, RANK)
    head = ("work", "unit", "ours", "plain", "ratio", "goal", "")
    table = [head, *[_cells(row) for row in rows]]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(head))]
    lines = [_line(cells, widths) for cells in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    failed = [f"{name} failed: {error}" for name, error in errors.items()]
    return "\n".join(
        [
            "",
            f"{run.setup.model_name}, LoRA rank {RANK}, {run.setup.dtype}, "
            f"{run.setup.threads} threads, plain loop "
            f"{'under autocast' if run.setup.has_autocast else 'as peft has it'}; "
            f"best of the rounds; {seconds:.0f} s in all",
            "",
            *lines,
            "",
            "plain: a transformers + peft loop; behind a slash: ours, the second way.",
            "ratio: ours / plain, of memory plain / ours.",
            f"peak: {run.peaks[run.setup.dtype] / 1e9:.0f} GFLOP/s in {run.setup.dtype}. FLOP a "
            f"token: 4 a frozen weight (forward, gradient of the input), 6 a LoRA weight = "
            f"{flops.nominal / 1e6:.0f} M, {flops.head / 1e6:.0f} M of it the head's;",
            "nominal: all of it for every token; needed: a shared prompt once, the head only where "
            "a target counts.",
            *failed,
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    verdict = {None: "", True: "reached", False: "missed"}[row.is_reached]
    return (row.work, row.unit, number(row.ours), number(row.other), ratio, row.goal, verdict)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    is_text = (True, True, False, False, False, False, True)
    padded = [
        cell.ljust(width) if left else cell.rjust(width)
        for cell, width, left in zip(cells, widths, is_text, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _record(
    run: Run, rows: Sequence[Row], errors: dict[str, str], seconds: float
) -> dict[str, object]:
    return {
        "setup": {**asdict(run.setup), "model_folder": str(run.setup.model_folder)},
        "sizes": asdict(run.workloads.sizes),
        "matmul_flops_per_s": run.peaks,
        "rows": [asdict(row) for row in rows],
        "errors": errors,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
