"""What a distillation needs settled: its prompts, its teacher, found and priced; its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio.to_thread

from tinker_mcp.errors import NotFoundError, RequestFailedError, TinkerMcpError
from tinker_mcp.runs.distill_options import GROUP_SIZES, DistillArguments, DistillOptions, Mode
from tinker_mcp.runs.planning import checks, prompt_sets
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.checks import Base
from tinker_mcp.runs.planning.distill_checks import mode_of
from tinker_mcp.runs.planning.estimate import Estimate, evaluations
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.material import Material
from tinker_mcp.runs.planning.prompt_sets import PromptSets
from tinker_mcp.runs.planning.sets import LONGEST
from tinker_mcp.runs.policy.teacher import instructed
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import CACHED_SHARE
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.training import building, models, rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.prices import Price
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker


_SAMPLES: dict[Mode, str] = {"on_policy": "sampled_tokens", "off_policy": "teacher_answers"}
_LOW_SHARE = 0.25  # of max_tokens, in the low estimate
_NOT_MEASURED = "not measured for distillation; the first steps of the run tell"


@dataclass(frozen=True)
class DistillMaterial:
    """What a distillation is made of.

    Attributes:
        teacher_price: None where it is unknown, or nothing is paid.
        teacher_tokens: Of all prompts as the teacher gets them.
    """

    material: Material
    options: DistillOptions
    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    teacher_price: Price | None
    teacher_tokens: int


async def material(
    workspace: Workspace,
    arguments: RunArguments,
    backend: Backend,
    base: Base,
    findings: Findings,
) -> DistillMaterial | None:
    """Prompts and options; None where they cannot be used, which `findings` says."""
    asked, mode = arguments.distill, mode_of(arguments)
    if asked is None or mode is None:
        return None
    settings = workspace.connector.settings
    both = await anyio.to_thread.run_sync(
        prompt_sets.build, settings, arguments, backend, base, asked.max_tokens, findings
    )
    if both is None:
        return None
    who = await _teacher(workspace, asked, both.renderer, findings)
    if who is None:
        return None
    settled = await anyio.to_thread.run_sync(
        _settled, workspace, mode, asked, backend, both, who, findings
    )
    if settled is None:
        return None
    prompts, held_out, options = both.train.prompts, both.held_out, settled.options
    made = Material(
        train=both.train.facts,
        held_out=held_out.facts if held_out else None,
        units=len(prompts) * (options.group_size if mode == "off_policy" else 1),
        renderer=both.renderer.name,
        max_length=both.max_length,
        train_on_what=_SAMPLES[mode],
    )
    return DistillMaterial(
        made,
        options,
        prompts,
        held_out.prompts if held_out else (),
        settled.price,
        sum(settled.lengths),
    )


@dataclass(frozen=True)
class _Teaching:
    """The options, settled.

    Attributes:
        price: Of the teacher.
        lengths: Tokens of each prompt as the teacher gets it.
    """

    options: DistillOptions
    price: Price | None
    lengths: Sequence[int]


@dataclass(frozen=True)
class _Teacher:
    """Who it is.

    Attributes:
        limit: Tokens that it takes, where the backend says so.
    """

    base_model: str
    checkpoint: str | None
    limit: int | None


async def _teacher(
    workspace: Workspace, asked: DistillArguments, student: ModelRenderer, findings: Findings
) -> _Teacher | None:
    _, capabilities = await workspace.ask(
        "capabilities", lambda rest: rest.get_server_capabilities()
    )
    served = [str(model.model_name) for model in capabilities.supported_models if model.model_name]
    named = asked.teacher or student.model_name
    checkpoint = named if named.startswith("tinker://") else None
    base_model: str | None = named
    if checkpoint is not None:
        base_model = await _model_of(workspace, checkpoint, findings)
    if base_model is None:
        return None
    if base_model not in served:
        problem, fix = models.absent(base_model, served)
        findings.refuse(f"teacher: {problem}", fix)
        return None
    return _Teacher(base_model, checkpoint, building.context_length(capabilities, base_model))


async def _model_of(workspace: Workspace, path: str, findings: Findings) -> str | None:
    """The base model of sampler weights."""
    import tinker

    listed = "Call list_checkpoints(kind=sampler) for those there are."
    try:
        parsed = tinker.ParsedCheckpointTinkerPath.from_tinker_path(path)
    except ValueError:
        findings.refuse(
            f"teacher={path!r} is no checkpoint's path, such as tinker://RUN/sampler_weights/NAME",
            listed,
        )
        return None
    if parsed.checkpoint_type != "sampler":
        findings.refuse(
            f"teacher={path!r} holds {parsed.checkpoint_type} weights, which cannot be sampled",
            "Give the sampler weights that were saved with it: "
            "call list_checkpoints(kind=sampler).",
        )
        return None
    try:
        found = await workspace.ask(
            f"weights_info {path}", lambda rest: rest.get_weights_info_by_tinker_path(path)
        )
    except (NotFoundError, RequestFailedError) as error:
        findings.refuse(f"teacher={path!r} cannot be used: {error.problem.rstrip('.')}", listed)
        return None
    info: tinker.types.WeightsInfoResponse = found[1]
    return info.base_model


def _settled(
    workspace: Workspace,
    mode: Mode,
    asked: DistillArguments,
    backend: Backend,
    both: PromptSets,
    who: _Teacher,
    findings: Findings,
) -> _Teaching | None:
    """Blocks."""
    student = both.renderer
    try:
        teacher = (
            student
            if who.base_model == student.model_name
            else rendering.load(backend, who.base_model, None)
        )
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    is_same = _has_same_tokens(teacher, student)
    if mode == "on_policy" and not is_same:
        findings.refuse(
            f"The teacher {who.base_model} has another tokenizer than {student.model_name}, so it "
            "cannot score the student's tokens",
            "Give a teacher of the student's family, or mode=off_policy, which goes by text.",
        )
        return None
    lengths = _lengths(both, asked, teacher, mode)
    room = (who.limit or LONGEST) - asked.max_tokens
    if max(lengths) > room:
        findings.refuse(
            f"The longest prompt has {max(lengths)} tokens for the teacher {who.base_model}, its "
            "system prompt included, and with max_tokens for the answer there is room for "
            f"{max(room, 0)}",
            "Give a smaller max_tokens, or shorten the prompts.",
        )
        return None
    if mode == "off_policy" and not is_same:
        findings.warn(
            f"The teacher {who.base_model} has another tokenizer: its answers are learned as text, "
            f"and those that max_tokens={asked.max_tokens} cuts are left out."
        )
    settings = workspace.connector.settings
    own = checks.price(backend, student.model_name, settings, findings)
    price = checks.price(backend, who.base_model, settings, findings)
    settled = DistillOptions(
        **asked.model_dump(exclude={"teacher", "mode", "group_size"}),
        mode=mode,
        teacher_base_model=who.base_model,
        teacher_checkpoint=who.checkpoint,
        teacher_renderer=teacher.name,
        has_same_tokenizer=is_same,
        group_size=asked.group_size or GROUP_SIZES[mode],
        prefill_usd_per_million=own.prefill if own else None,
        sample_usd_per_million=own.sample if own else None,
        teacher_prefill_usd_per_million=price.prefill if price else None,
        teacher_sample_usd_per_million=price.sample if price else None,
    )
    return _Teaching(settled, price, lengths)


def _has_same_tokens(teacher: ModelRenderer, student: ModelRenderer) -> bool:
    """Whether every token id means the same to both."""
    if teacher.tokenizer is student.tokenizer:
        return True
    return bool(teacher.tokenizer.get_vocab() == student.tokenizer.get_vocab())


def _lengths(
    both: PromptSets, asked: DistillArguments, teacher: ModelRenderer, mode: Mode
) -> list[int]:
    """Tokens of each prompt as the teacher gets it."""
    sides = [both.train, *([both.held_out] if both.held_out else [])]
    if mode == "on_policy":
        return [length for side in sides for length in side.lengths]
    return [
        teacher.prompt(instructed(row.messages, asked.system_prompt)).length  # type: ignore[arg-type]  # checked by prompts
        for side in sides
        for row in side.prompts
    ]


# What it will take


def estimate(spec: RunSpec, found: DistillMaterial, price: Price | None) -> Estimate:
    """What a run takes: an answer has a quarter of max_tokens at the low end, all at the high.

    Args:
        price: Of the student.
    """
    low, high = (_tokens(spec, found, share) for share in (_LOW_SHARE, 1.0))
    told = {name: round(count) for name, count in vars(low).items() if count}
    tokens = {**told, "total": sum(told.values())}
    if spec.backend == "local":
        return Estimate("local", tokens, 0.0, 0.0, None, None, _NOT_MEASURED)
    known = _known(spec, price, found.teacher_price)
    if price is None or known is None:
        return Estimate("hosted", tokens, None, None, price)
    replayed = min(spec.save_every or spec.steps, spec.steps) / spec.steps  # by one crash
    dearer = price.train_at_most / price.train if price.train else 1.0
    return Estimate(
        "hosted",
        tokens,
        usd_low=low.usd(known),
        usd_high=high.usd(known) * (1 + replayed) * dearer,
        price=price,
    )


@dataclass(frozen=True)
class _Tokens:
    """Of a whole run; what a teacher scores is its prefill."""

    train: float = 0.0
    eval: float = 0.0
    prefill: float = 0.0
    sample: float = 0.0
    teacher_prefill: float = 0.0
    teacher_sample: float = 0.0

    def usd(self, prices: _Tokens) -> float:
        """What they cost, at prices a million."""
        return float(sum(n * getattr(prices, name) for name, n in vars(self).items())) / 1e6


def _known(spec: RunSpec, student: Price | None, teacher: Price | None) -> _Tokens | None:
    """The price of each kind of token; None where one that is needed is unknown."""
    if student is None or teacher is None or teacher.prefill is None:
        return None
    is_on_policy = spec.distill is not None and spec.distill.mode == "on_policy"
    needed = (student.prefill, student.sample) if is_on_policy else (teacher.sample,)
    if None in needed:
        return None
    return _Tokens(
        train=student.train,
        eval=student.train,
        prefill=student.prefill or 0.0,
        sample=student.sample or 0.0,
        teacher_prefill=teacher.prefill,
        teacher_sample=teacher.sample or 0.0,
    )


def _tokens(spec: RunSpec, found: DistillMaterial, share: float) -> _Tokens:
    """Each answer takes a share of max_tokens."""
    options, held_out = found.options, spec.held_out
    answer, size = options.max_tokens * share, options.group_size
    prompt = spec.train.tokens / spec.train.datums
    apart = held_out.datums if held_out else 0
    evaluated = evaluations(spec.steps, spec.eval_every) if held_out else 0
    again = evaluated * ((held_out.tokens if held_out else 0) + apart * answer)
    if options.mode == "off_policy":
        cached = CACHED_SHARE * (size - 1) * spec.train.datums / (spec.train.datums + apart)
        return _Tokens(
            train=spec.steps * spec.batch_size * (prompt + answer),
            eval=again,
            teacher_prefill=found.teacher_tokens * (1 + cached),
            teacher_sample=(spec.train.datums * size + apart) * answer,
        )
    groups = spec.steps * spec.batch_size
    samples, asked = groups * size, evaluated * apart
    trained = samples * (prompt + answer)
    return _Tokens(
        train=trained,
        prefill=prompt * (groups + asked + CACHED_SHARE * (samples - groups)),
        sample=(samples + asked) * answer,
        teacher_prefill=trained + again,
    )
