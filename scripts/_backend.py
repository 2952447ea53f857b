"""What every script here shares: which backend and model, what it costs, how a script ends.

No training loop: those are in the scripts. Whoever copies a script copies this file with it; both
need tinker-mcp installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tinker

from tinker_mcp.errors import InvalidInputError, TinkerMcpError
from tinker_mcp.settings import Settings
from tinker_mcp.training import datasets, models, prices, rendering, sdk_errors, sessions
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.formats import Pair

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the local backend
CONVERSATIONS = Path(str(resources.files("tinker_cookbook"))) / "example_data/conversations.jsonl"
_PREAMBLE = "Certainly! As an AI language model, I am happy to help you with that. "
_FREE = prices.Price(0.0, "the local backend", "", prefill=0.0, sample=0.0)
_START_LIMIT_S = 900.0  # the first start of the local backend downloads a model
_HIGHEST_RATE = 1e-2  # 72 of 80 runs at 3e-3 diverged (Tinker's sweep of 27 models)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on the backend that the environment means."""

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
        """What it is, for a plan."""
        place = {"backend": self.backend.label, "base_model": self.base_model}
        return place | {"renderer": self.model.name}


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--base-model", default=BASE_MODEL, help="default: %(default)s")
    made.add_argument("--dry-run", action="store_true", help="check all, show the cost, and end")
    made.add_argument("--json", action="store_true", help="the result as one line of JSON")
    return made


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
            next_step="Try 3e-4 (SFT), 1e-5 (DPO) or 2e-5 (RL).",
        )


def preferences(path: Path | None) -> list[Pair]:
    """The pairs of a file; without one, the cookbook's conversations, their replies as they are
    preferred to the same with a preamble.

    Raises:
        TinkerMcpError: As `examples` does.
    """
    if path is not None:
        return examples(path, "preference")
    pairs = []
    for one in examples(CONVERSATIONS):
        *before, reply = one.messages
        wordy = {**reply, "content": _PREAMBLE + str(reply["content"])}
        pairs.append(Pair(one.place, [*before, reply], [*before, wordy]))
    return pairs


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
    before, answer = prompt.length - 1, list(sequence.tokens)
    return tinker.Datum(
        model_input=prompt.append(tinker.EncodedTextChunk(tokens=answer[:-1])),
        loss_fn_inputs={
            "target_tokens": [0] * before + answer,
            "logprobs": [0.0] * before + list(sequence.logprobs or ()),
            "advantages": [0.0] * before + list(advantages),
        },
    )


def tokens(datums: Sequence[tinker.Datum]) -> int:
    """Positions, which are what is billed."""
    return sum(datum.model_input.length for datum in datums)


def tell(*words: object) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(*words, file=sys.stderr, flush=True)


def main(run: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> None:
    """Run a script: its result on stdout, or one sentence on stderr and status 1."""
    try:
        with sdk_errors.told():
            result = run(args)
    except TinkerMcpError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
