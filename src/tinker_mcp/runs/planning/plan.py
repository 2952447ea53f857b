"""From the arguments of a run to one that is checked: all that can fail for free fails here.

Everything found is told at once. Nothing is trained, scored or paid; `forecast` alone takes some
steps on the local backend, to see how fast it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.runs.planning import checks, distill_checks, distill_plan, rl_plan, sets, sources
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.checks import Base
from tinker_mcp.runs.planning.estimate import Estimate, Speed, estimate, known_speed, measured_speed
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.material import Material
from tinker_mcp.runs.planning.sets import Sets
from tinker_mcp.runs.planning.sources import Rows
from tinker_mcp.runs.spec import DATUM_METHODS, DataFacts, RunSpec
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.prices import Price

BETA = 0.1
_EVALUATIONS = 5
_CHECKPOINTS = 8


@dataclass(frozen=True)
class Planned:
    """A run ready to be started.

    Attributes:
        spec: Complete but for the hashes of its data, which has no file yet.
        train, held_out: Its datums, or its prompts, as `spec` describes them.
        warnings: What the caller should know; nothing of it forbids the run.
    """

    spec: RunSpec
    train: Sequence[Any]
    held_out: Sequence[Any]
    warnings: Sequence[str]
    estimate: Estimate


@dataclass(frozen=True)
class _Settled:
    planned: Planned
    backend: Backend
    price: Price | None


async def checked(workspace: Workspace, arguments: RunArguments) -> Planned:
    """Check and settle all of a run, however long that takes.

    Raises:
        InvalidInputError: Something stands in its way; all of it is told, each with its fix.
        BackendUnreachableError, BackendStartingError: The backend does not answer, or not yet.
    """
    findings = Findings(arguments.accept)
    settled = await _settled(workspace, arguments, findings)
    spec, told = settled.planned.spec, settled.planned.estimate
    checks.budget(arguments, spec, told, workspace.connector.settings, findings)
    findings.raise_if_any()
    return settled.planned


async def forecast(workspace: Workspace, arguments: RunArguments) -> Planned | None:
    """The same for an estimate: whatever it costs is allowed, and the local backend is measured.

    None when it takes longer than a call may: the same call takes it up again.
    """

    async def start() -> Planned:
        findings = Findings(arguments.accept)
        settled = await _settled(workspace, arguments, findings)
        findings.raise_if_any()
        planned = settled.planned
        if settled.backend.kind != "local" or planned.spec.method not in DATUM_METHODS:
            return planned
        speed = await measured_speed(
            settled.backend, planned.spec.base_model, planned.spec.rank, planned.train
        )
        return _with_speed(planned, settled.price, speed)

    return await workspace.unfinished.finish(
        ("forecast", repr(arguments)), start, None, workspace.deadline()
    )


async def _settled(workspace: Workspace, arguments: RunArguments, findings: Findings) -> _Settled:
    """The run with all problems but those of money; raises where they leave nothing to settle."""
    checks.agree(arguments, findings)
    try:
        backend, capabilities = await workspace.ask(
            "capabilities", lambda rest: rest.get_server_capabilities()
        )
    except TinkerMcpError as error:
        if findings.problems:
            findings.refuse_error(error)
            findings.raise_if_any()
        raise
    base = await checks.base(workspace, arguments, capabilities, findings)
    if base is None:
        if arguments.method in DATUM_METHODS:
            await anyio.to_thread.run_sync(sets.check, workspace, arguments, findings)
        raise findings.error()
    if arguments.method == "rl":
        return await _settled_rl(workspace, arguments, backend, base, findings)
    if arguments.method in distill_checks.METHODS:
        return await _settled_distill(workspace, arguments, backend, base, findings)
    both = await anyio.to_thread.run_sync(sets.build, workspace, arguments, backend, base, findings)
    price = checks.price(backend, base.model_name, workspace.connector.settings, findings)
    if both is None:
        raise await _refusal(arguments, base, findings)
    material = await anyio.to_thread.run_sync(_of_sets, both)
    spec = await anyio.to_thread.run_sync(
        _spec, arguments, backend, base, material, price, findings
    )
    planned = Planned(
        spec=spec,
        train=both.train.datums,
        held_out=both.held_out.datums if both.held_out else (),
        warnings=findings.warnings,
        estimate=estimate(
            spec,
            _unit_tokens(both.train),
            price,
            known_speed(backend, spec.base_model, spec.rank),
        ),
    )
    return _Settled(planned, backend, price)


async def _refusal(arguments: RunArguments, base: Base, findings: Findings) -> InvalidInputError:
    """The error of data that cannot be used, with what is wrong of the rate as well."""
    await anyio.to_thread.run_sync(checks.learning_rate, arguments, base.model_name, findings)
    return findings.error()


async def _settled_rl(
    workspace: Workspace,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    findings: Findings,
) -> _Settled:
    """The same for rl: prompts with a reward, or an environment."""
    settings = workspace.connector.settings
    price = checks.price(backend, base.model_name, settings, findings)
    found = await rl_plan.material(settings, arguments, backend, base, price, findings)
    if found is None:
        raise await _refusal(arguments, base, findings)
    spec = await anyio.to_thread.run_sync(
        _spec, arguments, backend, base, found.material, price, findings
    )
    spec = spec.model_copy(update={"rl": found.options})
    planned = Planned(
        spec, found.train, found.held_out, findings.warnings, rl_plan.estimate(spec, price)
    )
    return _Settled(planned, backend, price)


async def _settled_distill(
    workspace: Workspace,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    findings: Findings,
) -> _Settled:
    """The same for a distillation: prompts, and a teacher."""
    settings = workspace.connector.settings
    price = checks.price(backend, base.model_name, settings, findings)
    found = await distill_plan.material(workspace, arguments, backend, base, findings)
    if found is None:
        raise await _refusal(arguments, base, findings)
    spec = await anyio.to_thread.run_sync(
        _spec, arguments, backend, base, found.material, price, findings
    )
    spec = spec.model_copy(update={"distill": found.options})
    told = distill_plan.estimate(spec, found, price)
    planned = Planned(spec, found.train, found.held_out, findings.warnings, told)
    return _Settled(planned, backend, price)


def _of_sets(both: Sets) -> Material:
    """Datums as a run has them."""
    return Material(
        train=_facts(both.train),
        held_out=_facts(both.held_out) if both.held_out else None,
        units=len(both.train.units),
        renderer=both.renderer,
        max_length=both.max_length,
        train_on_what=both.train.train_on_what,
    )


def _with_speed(planned: Planned, price: Price | None, speed: Speed) -> Planned:
    size = 2 if planned.spec.method == "dpo" else 1
    lengths = [datum.model_input.length for datum in planned.train]
    units = [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
    told = estimate(planned.spec, units, price, speed)
    return Planned(planned.spec, planned.train, planned.held_out, planned.warnings, told)


def _spec(
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    material: Material,
    price: Price | None,
    findings: Findings,
) -> RunSpec:
    """All that was left open, settled. Blocks."""
    units = material.units
    batch_size = checks.batch_size(arguments, units, findings)
    rate = checks.learning_rate(arguments, base.model_name, findings)
    steps = arguments.steps or _steps(arguments.epochs or 1.0, units, batch_size)
    eval_every = arguments.eval_every
    if eval_every is None:
        # An environment tells only when it is made whether it holds anything out.
        may_evaluate = material.held_out or (arguments.rl and arguments.rl.environment)
        eval_every = max(1, round(steps / _EVALUATIONS)) if may_evaluate else 0
    save_every = arguments.save_every
    return RunSpec(
        method=arguments.method,
        name=arguments.name or _name(arguments.method, base.model_name, material.train.source),
        backend=backend.kind,
        base_model=base.model_name,
        checkpoint=arguments.checkpoint,
        renderer=material.renderer,
        train_on_what=material.train_on_what,
        max_length=material.max_length,
        train=material.train,
        held_out=material.held_out,
        steps=steps,
        batch_size=batch_size,
        learning_rate=float(rate.value),
        learning_rate_source=rate.source,
        lr_schedule=arguments.lr_schedule,
        rank=base.rank,
        seed=arguments.seed,
        beta=(arguments.beta or BETA) if arguments.method == "dpo" else None,
        save_every=math.ceil(steps / _CHECKPOINTS) if save_every is None else save_every,
        eval_every=eval_every,
        ttl_s=arguments.ttl_s or None,
        max_usd=None if backend.kind == "local" else arguments.max_usd,
        usd_per_million=price.train if price else None,
        stops_on_divergence="divergence" not in arguments.accept,
        loggers=arguments.loggers,
    )


def _steps(epochs: float, units: int, batch_size: int) -> int:
    """As many as see every unit that often; the last batch runs over into the next epoch."""
    return max(1, math.ceil(epochs * units / batch_size - 1e-9))


def _name(method: str, base_model: str, source: str) -> str:
    data = source if sources.is_handle(source) else Path(source).stem
    model = base_model.rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", f"{method}-{model}-{data}")[:100]


def _facts(rows: Rows) -> DataFacts:
    import numpy as np

    return DataFacts(
        source=rows.source,
        sha256="",  # of the file that is written when the run is started
        datums=len(rows.datums),
        tokens=sum(datum.model_input.length for datum in rows.datums),
        trained_tokens=sum(
            int(np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()))
            for datum in rows.datums
        ),
        truncated=rows.truncated,
    )


def _unit_tokens(rows: Rows) -> list[int]:
    return [sum(datum.model_input.length for datum in unit) for unit in rows.units]
