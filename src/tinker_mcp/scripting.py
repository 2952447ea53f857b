"""What the scripts in `scripts/` share: backend and model, data, cost, and how a script ends.

For programs on the plain SDK, so that a copied script needs nothing beside it but tinker-mcp. It
holds no training loop: that is what the scripts show.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.settings import Settings
from tinker_mcp.training import datasets, models, prices, rendering, sdk_errors, sessions
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.formats import Pair

if TYPE_CHECKING:
    import tinker

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The default of `--base-model`: what the local backend serves without being told."""

_PREAMBLE = "Certainly! As an AI language model, I am happy to help you with that. "
_FREE = prices.Price(0.0, "the local backend", "", prefill=0.0, sample=0.0)
_START_LIMIT_S = 900.0  # the first start of the local backend downloads a model
_WEEK_S = 604_800
_HIGHEST_RATE = 1e-2  # 72 of 80 runs at 3e-3 diverged (Tinker's sweep of 27 models)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on the backend that the environment means.

    Attributes:
        price: None where it is unknown.
        context_length: In tokens; None where the backend does not tell.
    """

    backend: Backend
    base_model: str
    model: rendering.ModelRenderer
    price: prices.Price | None
    context_length: int | None

    def service(self) -> tinker.ServiceClient:
        """What opens training and sampling clients."""
        return sessions.open_service(self.backend)

    def usd(self, train: int = 0, prefill: int = 0, sample: int = 0) -> float | None:
        """What so many tokens cost; None where the price is unknown."""
        if self.price is None or self.price.prefill is None or self.price.sample is None:
            return None
        rates = (self.price.train, self.price.prefill, self.price.sample)
        return sum(n * rate for n, rate in zip((train, prefill, sample), rates, strict=True)) / 1e6

    def facts(self) -> dict[str, Any]:
        """Which backend, model and renderer."""
        place = {"backend": self.backend.label, "base_model": self.base_model}
        return place | {"renderer": self.model.name}

    def plan(self, **numbers: Any) -> dict[str, Any]:
        """`facts` and what is about to be done, told on stderr: the answer to `--dry-run`."""
        planned = self.facts() | numbers
        tell("plan:", planned)
        return planned


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--base-model", default=BASE_MODEL, help="default: %(default)s")
    made.add_argument("--dry-run", action="store_true", help="check all, show the cost, and end")
    made.add_argument("--json", action="store_true", help="the result as one line of JSON")
    return made


def training_parser(
    text: str | None, *, steps: int, learning_rate: float | None, name: str
) -> argparse.ArgumentParser:
    """A parser with the options that scripts have which train one LoRA.

    Args:
        learning_rate: The default for `BASE_MODEL`; None where the cookbook's advice is right for
            it too. Read it with `learning_rate(args)`.
        name: Of the checkpoint.
    """
    made = parser(text)
    small = "" if learning_rate is None else f"{learning_rate} for {BASE_MODEL}, else "
    made.set_defaults(small_learning_rate=learning_rate)
    made.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    made.add_argument(
        "--learning-rate", type=float, help=f"default: {small}the cookbook's advice for the model"
    )
    made.add_argument("--rank", type=int, default=32, help="of the LoRA; default: %(default)s")
    made.add_argument("--name", default=name, help="of the checkpoint; default: %(default)s")
    made.add_argument("--seed", type=int, default=0)
    return made


def learning_rate(args: argparse.Namespace, advice: models.Advice | None = None) -> float:
    """That of `--learning-rate`, else the script's own for `BASE_MODEL`, else the advice.

    Args:
        advice: By default that for supervised training of the model.
    """
    if args.learning_rate is not None:
        return float(args.learning_rate)
    if args.base_model == BASE_MODEL and args.small_learning_rate is not None:
        return float(args.small_learning_rate)
    return float((advice or models.learning_rate(args.base_model)).value)


def open_backend() -> tuple[Backend, list[tinker.types.SupportedModel]]:
    """The hosted service with TINKER_API_KEY, else the local one, started if need be.

    Returns:
        It, and the models that can be trained there. Neither costs anything.
    """
    settings = dataclasses.replace(
        Settings.from_environment(os.environ), call_limit_s=_START_LIMIT_S
    )
    with contextlib.redirect_stdout(sys.stderr):  # its log
        backend = asyncio.run(BackendConnector(settings).connect())
    offered = sessions.rest_client(backend).get_server_capabilities().result().supported_models
    return backend, [model for model in offered if model.trainable is not False]


def open_model(base_model: str) -> Opened:
    """The backend, and a model on it with its tokenizer and renderer.

    Raises:
        InvalidInputError: The backend does not serve it.
    """
    backend, offered = open_backend()
    limits = {str(model.model_name): model.max_context_length for model in offered}
    if base_model not in limits:
        problem, fix = models.absent(base_model, list(limits))
        raise InvalidInputError(f"{problem}.", next_step=fix.replace("list_models", "setup_check"))
    home = Settings.from_environment(os.environ).home
    price = _FREE if backend.kind == "local" else prices.price(base_model, home)
    model = rendering.load(backend, base_model, None)
    return Opened(backend, base_model, model, price, limits[base_model])


def example_data(name: str = "conversations.jsonl") -> Path:
    """A file of examples that the cookbook brings: by default 128 conversations."""
    import tinker_cookbook

    return Path(tinker_cookbook.__file__).parent / "example_data" / name


def examples(path: Path, kind: str = "supervised") -> list[Any]:
    """The `Conversation`s of a file, or with kind `preference` its `Pair`s.

    Raises:
        TinkerMcpError: There is no such file, or a row of it cannot be used.
    """
    found, problems = datasets.read_file(path, str(path), kind)
    if problems:
        what = f"{len(problems)} rows of {path} cannot be used; the first: {problems[0]}."
        raise InvalidInputError(what, next_step="Mend or remove them.")
    return list(found)


def preferences(path: Path | None) -> list[Pair]:
    """The pairs of a file; without one, the cookbook's conversations, their replies as they are
    preferred to the same with a preamble.

    Raises:
        TinkerMcpError: As `examples` does.
    """
    if path is not None:
        return examples(path, "preference")
    pairs = []
    for one in examples(example_data()):
        *before, reply = one.messages
        wordy = {**reply, "content": _PREAMBLE + str(reply["content"])}
        pairs.append(Pair(one.place, [*before, reply], [*before, wordy]))
    return pairs


def checked(args: argparse.Namespace, *counts: str, rate: float | None = None) -> None:
    """Refuse counts below 1, and learning rates that no run survives.

    Raises:
        InvalidInputError: One is so.
    """
    for name in counts:
        if getattr(args, name) < 1:
            option = "--" + name.replace("_", "-")
            raise InvalidInputError(f"{option} is {getattr(args, name)}.", next_step="Give 1 up.")
    if rate is not None and not 0 < rate < _HIGHEST_RATE:
        raise InvalidInputError(
            f"--learning-rate {rate} is not between 0 and {_HIGHEST_RATE}.",
            next_step="Try 3e-4 for a small model; setup_check.py tells the advice for each.",
        )


def with_answer(prompt: tinker.ModelInput, tokens: Sequence[int]) -> tinker.ModelInput:
    """A prompt of P tokens and N after it, to be scored: P+N tokens."""
    import tinker

    return prompt.append(tinker.EncodedTextChunk(tokens=list(tokens)))


def answer_datum(
    prompt: tinker.ModelInput, sequence: tinker.SampledSequence, advantages: Sequence[float]
) -> tinker.Datum:
    """A sampled answer for `importance_sampling` or `ppo`.

    Args:
        prompt: P tokens.
        sequence: The answer's N tokens, each with the log-probability it was sampled with.
        advantages: One for each of the N.

    Returns:
        A datum of P+N-1 positions; those of the prompt carry advantage 0.
    """
    import tinker

    before, answer = prompt.length - 1, list(sequence.tokens)
    columns: dict[str, tuple[tinker.TensorDtype, list[Any]]] = {
        "target_tokens": ("int64", [0] * before + answer),
        "logprobs": ("float32", [0.0] * before + list(sequence.logprobs or ())),
        "advantages": ("float32", [0.0] * before + list(advantages)),
    }
    inputs = {name: tinker.TensorData(data=v, dtype=d) for name, (d, v) in columns.items()}
    return tinker.Datum(model_input=with_answer(prompt, answer[:-1]), loss_fn_inputs=inputs)


def group_datums(
    prompt: tinker.ModelInput,
    sequences_G: Sequence[tinker.SampledSequence],
    rewards_G: Sequence[float],
) -> list[tinker.Datum]:
    """The G answers to one prompt; each one's advantage is its reward less the group's mean.

    Returns:
        G datums, or none where all rewards are equal: such a group has no gradient.
    """
    if min(rewards_G) == max(rewards_G):
        return []
    mean = sum(rewards_G) / len(rewards_G)
    return [
        answer_datum(prompt, sequence, [reward - mean] * len(sequence.tokens))
        for sequence, reward in zip(sequences_G, rewards_G, strict=True)
    ]


def drift(datums: Sequence[tinker.Datum], output: tinker.ForwardBackwardOutput) -> float:
    """Mean log-probability of the sampler less that of the trainer, over the sampled tokens.

    Below 0.01 when all is well; more where the sampler's weights are old.
    """
    differences = [
        (datum.loss_fn_inputs["logprobs"].to_torch() - found["logprobs"].to_torch())[
            datum.loss_fn_inputs["advantages"].to_torch() != 0
        ]
        for datum, found in zip(datums, output.loss_fn_outputs, strict=True)
    ]
    count = sum(len(difference) for difference in differences)
    return sum(float(difference.sum()) for difference in differences) / max(count, 1)


def tokens(datums: Sequence[tinker.Datum]) -> int:
    """Positions, which are what is billed."""
    return sum(datum.model_input.length for datum in datums)


def overlapped(submit: Callable[[int], Sequence[Any]], steps: int) -> Iterator[Any]:
    """What each step's forward_backward answers, in order.

    A step is submitted before the one ahead of it is awaited, so that no clock cycle of the
    service passes empty. supervised_training.py shows the same loop written out.

    Args:
        submit: Sends a step, counted from 0, and returns its futures: that of forward_backward,
            then that of optim_step.
    """
    requests = submit(0)
    for step in range(steps):
        upcoming = submit(step + 1) if step + 1 < steps else ()
        output, *_ = (request.result() for request in requests)
        yield output
        requests = upcoming


def saved(client: tinker.TrainingClient, name: str) -> dict[str, str]:
    """Save a client's weights for seven days, to sample from and to go on from.

    Returns:
        `sampler_path`, and `state_path`: the weights and Adam's moments.
    """
    sampler = client.save_weights_for_sampler(name, ttl_seconds=_WEEK_S)
    state = client.save_state(name, ttl_seconds=_WEEK_S)
    return {"sampler_path": sampler.result().path, "state_path": state.result().path}


def wandb() -> ModuleType:
    """Weights & Biases, asked for before anything is spent.

    Raises:
        InvalidInputError: It is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InvalidInputError(
            "wandb is not installed.", next_step="pip install 'tinker-mcp[wandb]'"
        ) from error


def tell(*words: object) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(*words, file=sys.stderr, flush=True)  # noqa: T201 - a script's, not the server's


def main(run: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> None:
    """Run a script: its result on stdout, or one sentence on stderr and status 1."""
    try:
        with sdk_errors.told():
            result = run(args)
    except TinkerMcpError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    as_text = json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items())
    print(as_text)  # noqa: T201 - a script's stdout is its result
