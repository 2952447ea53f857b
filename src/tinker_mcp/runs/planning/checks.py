"""The checks of a run, each told with its fix. All are free: nothing is trained or scored here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_mcp.errors import NotFoundError, RequestFailedError, TinkerMcpError
from tinker_mcp.runs.planning import distill_checks, rl_checks
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.planning.estimate import Estimate
from tinker_mcp.runs.planning.findings import Findings
from tinker_mcp.runs.planning.sources import Rows, is_handle
from tinker_mcp.runs.spec import DATUM_METHODS, RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.training import building, models, prices, rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.checkpoints import MAX_TTL_S, MIN_TTL_S
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.models import Advice
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

RANK = 32
_FACTOR_OFF = 10.0


@dataclass(frozen=True)
class Base:
    """What a run starts from.

    Attributes:
        limit: Tokens that the model takes, where the backend says so.
    """

    model_name: str
    rank: int
    limit: int | None


def agree(arguments: RunArguments, findings: Findings) -> None:
    """What can be said of the arguments alone."""
    if arguments.base_model is None and arguments.checkpoint is None:
        findings.refuse(
            "Neither base_model nor checkpoint is given",
            "Give base_model (list_models has them), or a state to start from.",
        )
    if arguments.steps is not None and arguments.epochs is not None:
        findings.refuse(
            f"steps={arguments.steps} and epochs={arguments.epochs:g} are both given",
            "Give one of them, or neither for one epoch.",
        )
    if arguments.eval_data is not None and arguments.eval_share:
        findings.refuse(
            f"eval_data and eval_share={arguments.eval_share:g} are both given",
            "Leave eval_share out to evaluate on eval_data.",
        )
    if arguments.method == "rl":
        rl_checks.agree(arguments, findings)
    elif arguments.rl is not None:
        findings.refuse("rl is for method=rl only", "Leave rl out.")
    distill_checks.agree(arguments, findings)
    if arguments.data is None and arguments.method in DATUM_METHODS:
        findings.refuse("data is missing", "Give a file, or a handle of build_datums.")
    if arguments.beta is not None and arguments.method != "dpo":
        findings.refuse(f"beta={arguments.beta:g} is for dpo only", "Leave beta out.")
    what = arguments.train_on_what
    if arguments.method == "dpo" and what not in (None, "last_assistant_message"):
        findings.refuse(
            f"train_on_what={what} does not go with dpo, which compares the last replies",
            "Leave train_on_what out.",
        )
    if arguments.ttl_s and not MIN_TTL_S <= arguments.ttl_s <= MAX_TTL_S:
        findings.refuse(
            f"ttl_s={arguments.ttl_s} is not between {MIN_TTL_S} (an hour) and {MAX_TTL_S} "
            "(ten years)",
            "Give one that is, or 0 to keep checkpoints for ever.",
        )
    try:
        building.check_columns(arguments.columns)
    except TinkerMcpError as error:
        findings.refuse_error(error)
    _check_held_out(arguments, findings)


def _check_held_out(arguments: RunArguments, findings: Findings) -> None:
    if arguments.eval_data is not None or arguments.eval_share:
        return
    if arguments.method not in DATUM_METHODS and not distill_checks.is_off_policy(arguments):
        return  # what is learned from is sampled anew at each step
    without = "nothing tells whether the run learns or only memorizes"
    if arguments.eval_share == 0 or "no_held_out" in arguments.accept:
        findings.warn(f"No held-out data: {without}.")
        return
    findings.refuse(
        f"Neither eval_data nor eval_share is given, so {without}",
        'Give eval_share=0.1, or eval_data, or add accept=["no_held_out"].',
    )


async def base(
    workspace: Workspace,
    arguments: RunArguments,
    capabilities: tinker.types.GetServerCapabilitiesResponse,
    findings: Findings,
) -> Base | None:
    """The model and rank, from the checkpoint where there is one; None where one is unusable."""
    served = [
        str(model.model_name)
        for model in capabilities.supported_models
        if model.model_name and model.trainable is not False
    ]
    model_name, rank = arguments.base_model, arguments.rank or RANK
    if model_name is not None and model_name not in served:
        findings.refuse(*models.absent(model_name, served))
        model_name = None
    if arguments.checkpoint is not None:
        info = await _checkpoint(workspace, arguments.checkpoint, findings)
        if info is None:
            return None
        _check_same(arguments, info, findings)
        model_name, rank = info.base_model, info.lora_rank or RANK
        if model_name not in served:
            findings.refuse(*models.absent(model_name, served))
            return None
    if model_name is None:
        return None
    return Base(model_name, rank, building.context_length(capabilities, model_name))


async def _checkpoint(
    workspace: Workspace, path: str, findings: Findings
) -> tinker.types.WeightsInfoResponse | None:
    import tinker

    try:
        parsed = tinker.ParsedCheckpointTinkerPath.from_tinker_path(path)
    except ValueError:
        findings.refuse(
            f"checkpoint={path!r} is no checkpoint's path, such as tinker://RUN/weights/NAME",
            "Call list_checkpoints(kind=state) for those there are.",
        )
        return None
    if parsed.checkpoint_type != "training":
        findings.refuse(
            f"checkpoint={path!r} holds {parsed.checkpoint_type} weights, which can be sampled "
            "but not trained on",
            "Give the state that was saved with it: call list_checkpoints(kind=state).",
        )
        return None
    try:
        found = await workspace.ask(
            f"weights_info {path}", lambda rest: rest.get_weights_info_by_tinker_path(path)
        )
    except (NotFoundError, RequestFailedError) as error:
        findings.refuse(
            f"checkpoint={path!r} cannot be used: {error.problem.rstrip('.')}",
            "Call list_checkpoints(kind=state) for those there are.",
        )
        return None
    info: tinker.types.WeightsInfoResponse = found[1]
    return info


def _check_same(
    arguments: RunArguments, info: tinker.types.WeightsInfoResponse, findings: Findings
) -> None:
    if arguments.base_model not in (None, info.base_model):
        findings.refuse(
            f"The checkpoint is of {info.base_model}, not of base_model={arguments.base_model}",
            "Leave base_model out: the checkpoint brings its own.",
        )
    if info.lora_rank and arguments.rank not in (None, info.lora_rank):
        findings.refuse(
            f"The checkpoint has rank {info.lora_rank}, not rank={arguments.rank}",
            "Leave rank out: the checkpoint brings its own.",
        )


def renderer(
    backend: Backend, model_name: str, name: str | None, findings: Findings
) -> ModelRenderer | None:
    """The renderer of a run; None where it cannot be used. Blocks."""
    try:
        model = rendering.load(backend, model_name, name)
        fitting = rendering.fitting(backend, model_name)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if model.name not in fitting:
        findings.ask(
            "renderer",
            f"renderer={model.name} does not fit {model_name}: its own chat format is that of "
            f"{' or '.join(fitting)}",
            f'Leave renderer out, or give renderer="{fitting[0]}".',
        )
    return model


def truncation(
    argument: str, rows: Rows, max_length: int, limit: int | None, findings: Findings
) -> None:
    """Whether rows are longer than what is trained on."""
    if not rows.truncated:
        return
    total = len(rows.units)
    if is_handle(rows.source):
        findings.warn(
            f"{rows.truncated} of {total} rows of {rows.source} were cut when it was made."
        )
        return
    findings.ask(
        "truncation",
        f"{rows.truncated} of {total} rows of {argument} are longer than {max_length} tokens and "
        f"would lose their ends, {rows.lost_tokens} tokens in all",
        "Shorten or split them: the model takes no more."
        if max_length == limit
        else "Raise max_length, or shorten them.",
    )


def fits_context(argument: str, rows: Rows, limit: int | None, findings: Findings) -> None:
    """Whether datums that were made elsewhere are too long for the model."""
    longest = max(datum.model_input.length for datum in rows.datums) + 1
    if limit is not None and longest > limit:
        findings.refuse(
            f"The longest datum of {argument}={rows.source} has {longest} tokens; the model takes "
            f"{limit}",
            f"Call build_datums again with max_length={limit}.",
        )


def overlap(train: Rows, held_out: Rows, findings: Findings) -> None:
    """Whether held-out rows are trained on as well."""
    trained = set(map(_content, train.units))
    shared = sum(_content(unit) in trained for unit in held_out.units)
    if shared:
        findings.warn(
            f"{shared} of {len(held_out.units)} held-out rows are trained on as well, so the "
            "held-out loss will look better than it is: remove duplicates."
        )


def _content(unit: Sequence[tinker.Datum]) -> Hashable:
    """Its tokens: targets are the inputs shifted by one, so only the first input is missing."""
    return tuple(
        (datum.model_input.to_ints()[0], datum.loss_fn_inputs["target_tokens"].to_numpy().tobytes())
        for datum in unit
    )


def batch_size(arguments: RunArguments, units: int, findings: Findings) -> int:
    """Units a step; by default not more than there are."""
    if arguments.batch_size is None:
        return min(32 if arguments.method == "sft" else 16, units)
    if arguments.batch_size > units:
        what = {"sft": "datums", "dpo": "pairs"}.get(arguments.method, "prompts")
        findings.refuse(
            f"batch_size={arguments.batch_size} is more than the {units} {what} to train on",
            f"Give batch_size={units} or less.",
        )
    return arguments.batch_size


def learning_rate(arguments: RunArguments, model_name: str, findings: Findings) -> Advice:
    """The rate and its source; refused where it is ten times off the advice."""
    of_method = {"dpo": models.dpo_learning_rate, "rl": models.rl_learning_rate}
    known = of_method.get(arguments.method)
    if distill_checks.is_on_policy(arguments):
        known = models.distill_learning_rate
    advice = known() if known else models.learning_rate(model_name)
    if arguments.learning_rate == "auto":
        return advice
    given, advised = arguments.learning_rate, float(advice.value)
    if abs(math.log10(given / advised)) >= math.log10(_FACTOR_OFF) - 1e-9:
        findings.ask(
            "learning_rate",
            f"learning_rate={given:g} is {max(given / advised, advised / given):.0f} times "
            f"{'above' if given > advised else 'below'} the {advised:.3g} advised for "
            f"{arguments.method} on {model_name} ({advice.source})",
            'Give learning_rate="auto".',
        )
    return Advice(given, "given by the caller")


def price(
    backend: Backend, model_name: str, settings: Settings, findings: Findings
) -> prices.Price | None:
    """What a token of the model costs; None where that is unknown, or nothing."""
    if backend.kind == "local":
        return None
    try:
        found = prices.price(model_name, settings.home)
    except TinkerMcpError as error:
        findings.refuse_error(error)
        return None
    if found is not None and "train" in found.derived:
        findings.warn(
            f"The train price of {model_name}, ${found.train:g} a million tokens, is derived and "
            f"may be up to ${found.train_at_most:.3g}; the true one can be put into "
            f"{prices.own_file(settings.home)}."
        )
    return found


def budget(
    arguments: RunArguments,
    spec: RunSpec,
    estimate: Estimate,
    settings: Settings,
    findings: Findings,
) -> None:
    """Whether the run may cost what it will cost."""
    if spec.backend == "local" or estimate.usd_high == 0:
        return
    others = "" if spec.method in DATUM_METHODS else ', "prefill": ..., "sample": ...'
    if estimate.usd_low is None or estimate.usd_high is None:
        findings.refuse(
            f"The price of {spec.base_model} is unknown, so no max_usd could be enforced",
            f'Put it into {prices.own_file(settings.home)}: {{"{spec.base_model}": {{"train": <USD '
            f"per million tokens>{others}}}}}, 0 where it is free; then call again.",
        )
        return
    told = f"${estimate.usd_low:.4g} to ${estimate.usd_high:.4g}"
    if arguments.max_usd is None:
        findings.refuse(
            f"max_usd is missing, and this run will cost about {told}",
            f"Ask the user, then give max_usd={_up(estimate.usd_high)} or what they allow.",
        )
    elif arguments.max_usd < estimate.usd_low:
        findings.refuse(
            f"max_usd={arguments.max_usd:g} is below the estimate of {told} for {spec.steps} steps",
            f"Give max_usd={_up(estimate.usd_high)}, or train less: "
            f"{_affordable(arguments.max_usd, spec, estimate)}.",
        )


def _up(usd: float) -> float:
    """Rounded up to a cent."""
    return math.ceil(usd * 100 - 1e-9) / 100


def _affordable(max_usd: float, spec: RunSpec, estimate: Estimate) -> str:
    """How many steps the money is enough for."""
    total = estimate.tokens["total"]
    first = estimate.tokens.get("references", 0)
    affordable = total * max_usd / (estimate.usd_low or 1) - first
    if affordable < 0:
        usd = (estimate.usd_low or 0) * first / total
        return f"it is not enough for the pass over all pairs before the first step, ${usd:.4g}"
    steps = math.floor(spec.steps * affordable / (total - first))
    return f"it is enough for steps={steps}" if steps >= 1 else "it is not enough for one step"
