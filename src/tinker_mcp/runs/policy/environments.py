"""Environments by name: of the cookbook or like its own, of `verifiers`, of `reasoning-gym`.

They run in the worker, outside any jail, so only installed modules are taken, never a path.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy.rollouts import Policy, PromptGroup
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.runs.rl_options import EnvironmentSpec
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.rendering import ModelRenderer
from tinker_mcp.training.rewards.contract import Completion, Row, Scored

if TYPE_CHECKING:
    from tinker_cookbook.rl.types import TrajectoryGroup

_DOTTED = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)+):(?P<name>[A-Za-z_]\w*)")
_PACKAGES = {
    "verifiers": ("verifiers", "verifiers"),
    "reasoning_gym": ("reasoning_gym", "reasoning-gym"),
}
"""What stands before the colon: the module it needs, and the extra that installs it."""

_PROBLEMS = 1000  # of a reasoning-gym task where `size` is not given

HELD_OUT_GROUPS = 64
"""Of an evaluation, at most: each is played through, and a game may have many turns."""

_PROBLEMS_A_HELD_OUT = 10  # of a reasoning-gym task


@dataclass(frozen=True)
class Place:
    """Where an environment is to work: what it need not be told.

    Attributes:
        batch_size: Groups a step.
    """

    backend: Backend
    renderer: ModelRenderer
    batch_size: int
    group_size: int
    max_tokens: int
    temperature: float
    steps: int
    seed: int

    @property
    def known(self) -> Mapping[str, Any]:
        """By the names that environments have for it."""
        return {
            **dict.fromkeys(("batch_size", "groups_per_batch"), self.batch_size),
            **dict.fromkeys(("group_size", "train_group_size", "num_envs"), self.group_size),
            "test_group_size": 1,
            **dict.fromkeys(("model_name_for_tokenizer", "model_name"), self.renderer.model_name),
            "renderer_name": self.renderer.name,
            "renderer": self.renderer.renderer,
            "tokenizer": self.renderer.tokenizer,
            "base_url": self.backend.base_url,
            "n_batches": self.steps,
            "seed": self.seed,
        }


class Environment(Protocol):
    """Gives each step its groups."""

    def batch(self, step: int) -> Sequence[Any]:
        """EnvGroupBuilders of a step, counted from 1; the same whenever it is asked."""

    def held_out(self) -> Sequence[Any]:
        """Those of an evaluation, at most HELD_OUT_GROUPS; none where it holds nothing out."""


def holds_out(spec: EnvironmentSpec) -> bool | None:
    """Whether an environment that was checked holds groups out; None where it has yet to be made.

    It is for its builder to say. Blocks.
    """
    from tinker_cookbook.rl.types import EnvGroupBuilder

    kind = spec.name.partition(":")[0]
    if kind in _PACKAGES:
        return kind == "reasoning_gym"
    target = _target(spec.name)
    return False if inspect.isclass(target) and issubclass(target, EnvGroupBuilder) else None


def check(spec: EnvironmentSpec) -> None:
    """Whether there is such an environment here; imports its module. Blocks.

    Raises:
        InvalidInputError: There is none, it is not installed, or its module cannot be imported.
    """
    kind, _, name = spec.name.partition(":")
    if kind in _PACKAGES:
        _check_package(kind)
        if kind == "reasoning_gym":
            _check_task(name)
        return
    _target(spec.name)


async def opened(spec: EnvironmentSpec, place: Place) -> Environment:
    """The environment, ready for its first batch.

    Raises:
        InvalidInputError: There is none of this name, or it cannot be made with these arguments.
    """
    kind, _, name = spec.name.partition(":")
    if kind == "reasoning_gym":
        _check_package(kind)
        _check_task(name)
        return _reasoning_gym(name, spec.args, place)
    _make_at_home(place)
    if kind == "verifiers":
        _check_package(kind)
        return _verifiers(name, spec.args, place)
    return await _cookbooks(spec, place)


def _check_package(kind: str) -> None:
    module, extra = _PACKAGES[kind]
    if importlib.util.find_spec(module) is None:
        raise InvalidInputError(
            f"{kind} environments need the package {extra}, which is not installed.",
            next_step=f'Ask the user to run: pip install "tinker-mcp[{extra}]", then call again.',
        )


def _check_task(name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        import difflib

        close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
        raise InvalidInputError(
            f"reasoning-gym has no task {name!r} among its {len(DATASETS)}.",
            next_step=f"Use one of them, such as {', '.join(close)}.",
        )


# The cookbook's own, and what is like them


def _target(name: str) -> Any:
    """What a dotted path names, if it is installed."""
    found = _DOTTED.fullmatch(name)
    if found is None:
        raise InvalidInputError(
            f"environment={name[:100]!r} is none.",
            next_step="Give package.module:Name of an installed module, verifiers:NAME or "
            "reasoning_gym:NAME; a file of your own can be a reward, which is jailed.",
        )
    module = found["module"]
    if not _is_installed(module):
        raise InvalidInputError(
            f"environment={name!r}: there is no installed module {module!r}.",
            next_step="Ask the user to install the package that holds it: environments run "
            "without a jail, so files that merely lie somewhere are not taken.",
        )
    try:
        return getattr(importlib.import_module(module), found["name"])
    except Exception as error:  # whatever a module does while it is imported
        raise InvalidInputError(
            f"environment={name!r} cannot be loaded: {type(error).__name__}: {str(error)[:300]}",
            next_step="Check the name behind the colon, and what the module itself needs.",
        ) from error


def _is_installed(module: str) -> bool:
    """Whether it belongs to an installed distribution, or lies among those."""
    root = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if root in importlib.metadata.packages_distributions():
        return True
    folders = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    places = [Path(spec.origin).resolve()] if spec.origin else []
    return any(place.is_relative_to(folder) for place in places for folder in folders)


async def _cookbooks(spec: EnvironmentSpec, place: Place) -> Environment:
    from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

    target = _target(spec.name)
    if inspect.isclass(target) and issubclass(target, EnvGroupBuilder):
        return _Factory(target, spec, place)
    made = _made(target, spec, place.known)
    if isinstance(made, RLDatasetBuilder):
        made = made()
    if inspect.isawaitable(made):
        made = await made
    made, held_out = made if isinstance(made, tuple) else (made, None)
    if isinstance(made, RLDataset):
        return _Dataset(made, held_out, spec.name)
    if isinstance(made, EnvGroupBuilder):
        return _Factory(target, spec, place)
    raise InvalidInputError(
        f"environment={spec.name!r} gives a {type(made).__name__}.",
        next_step="Name an EnvGroupBuilder, an RLDataset, an RLDatasetBuilder, or a function that "
        "returns one of them.",
    )


def _made(target: Any, spec: EnvironmentSpec, known: Mapping[str, Any]) -> Any:
    """Call it with what was given, and what it takes of what is known."""
    try:
        takes = inspect.signature(target).parameters
        filled = {
            name: value for name, value in known.items() if name in takes and name not in spec.args
        }
        return target(**filled, **spec.args)
    except Exception as error:  # whatever foreign code raises
        raise InvalidInputError(
            f"environment={spec.name!r} cannot be made: {type(error).__name__}: {str(error)[:300]}",
            next_step="Give what it needs in args: "
            '{"name": ..., "args": {...}}; sizes, renderer and model are filled in.',
        ) from error


@dataclass(frozen=True)
class _Dataset:
    """An RLDataset, from its beginning again when it is through.

    Attributes:
        test: The held-out one, or None.
    """

    dataset: Any
    test: Any
    name: str

    def batch(self, step: int) -> Sequence[Any]:
        batches = len(self.dataset)
        if batches < 1:
            raise InvalidInputError(
                f"environment={self.name!r} has not one whole batch.",
                next_step="Give a smaller batch_size.",
            )
        found: Sequence[Any] = self.dataset.get_batch((step - 1) % batches)
        return found

    def held_out(self) -> Sequence[Any]:
        found: list[Any] = []
        for index in range(len(self.test) if self.test is not None else 0):
            if len(found) >= HELD_OUT_GROUPS:
                break
            found += self.test.get_batch(index)
        return found[:HELD_OUT_GROUPS]


@dataclass(frozen=True)
class _Factory:
    """What makes an EnvGroupBuilder a call; it is told which one by `seed` or `index`."""

    target: Any
    spec: EnvironmentSpec
    place: Place

    def batch(self, step: int) -> Sequence[Any]:
        first = (step - 1) * self.place.batch_size
        return [
            _made(
                self.target,
                self.spec,
                {**self.place.known, "seed": self.place.seed + number, "index": number},
            )
            for number in range(first, first + self.place.batch_size)
        ]

    def held_out(self) -> Sequence[Any]:
        return ()


def _make_at_home(place: Place) -> None:
    """Have the cookbook's helpers find this run's tokenizer, renderer and backend.

    For this process alone, which is a worker's. The cookbook has a registry of tokenizers, but
    none for what it knows of models, such as the renderer of one that is served locally.
    """
    from tinker_cookbook import model_info
    from tinker_cookbook.tokenizer_utils import register_tokenizer

    own, known = place.renderer, model_info.get_recommended_renderer_names

    def recommended(model_name: str) -> list[str]:
        return [own.name] if model_name == own.model_name else known(model_name)

    model_info.get_recommended_renderer_names = recommended
    register_tokenizer(own.model_name, lambda: own.tokenizer)
    os.environ.setdefault("TINKER_BASE_URL", place.backend.base_url)
    if place.backend.api_key:
        os.environ.setdefault("TINKER_API_KEY", place.backend.api_key)


# reasoning-gym


@dataclass(frozen=True)
class _Tasks:
    """Rows of a reasoning-gym task, in an order of our own."""

    prompts: Sequence[Prompt]
    others: Sequence[Prompt]
    place: Place
    reward: _Verdict

    def batch(self, step: int) -> Sequence[Any]:
        place = self.place
        chosen = batch_of(self.prompts, place.batch_size, step - 1, place.seed)
        return [PromptGroup(one, place.renderer, place.group_size, self.reward) for one in chosen]

    def held_out(self) -> Sequence[Any]:
        return [PromptGroup(one, self.place.renderer, 1, self.reward) for one in self.others]


@dataclass(frozen=True)
class _Verdict:
    """The task's own grader as a `Reward`; the row holds the entry's number."""

    dataset: Any

    async def score(
        self, completions: Sequence[Completion], rows: Sequence[Row]
    ) -> Sequence[Scored]:
        from reasoning_gym.utils import extract_answer

        found = []
        for completion, row in zip(completions, rows, strict=True):
            answer = extract_answer(completion.text) or completion.text.strip()
            try:
                value = self.dataset.score_answer(answer, self.dataset[row["entry"]])
            except Exception as error:  # a grader that chokes on an answer
                found.append(Scored.failed(f"{type(error).__name__}: {str(error)[:200]}"))
            else:
                found.append(Scored.of(float(value)))
        return found

    def close(self) -> None:
        """There is nothing to end."""


def _reasoning_gym(name: str, args: Mapping[str, Any], place: Place) -> Environment:
    import reasoning_gym

    given = {"size": _PROBLEMS, "seed": place.seed, **args}
    with _refused(f"reasoning_gym:{name}"):
        dataset = reasoning_gym.create_dataset(name, **given)
        prompts = [
            Prompt(
                [{"role": "user", "content": dataset[entry]["question"]}],
                {"entry": entry, "answer": str(dataset[entry]["answer"])},
            )
            for entry in range(given["size"])
        ]
    aside = min(HELD_OUT_GROUPS, len(prompts) // _PROBLEMS_A_HELD_OUT)
    cut = len(prompts) - aside
    return _Tasks(prompts[:cut], prompts[cut:], place, _Verdict(dataset))


# verifiers


@dataclass
class _VerifiersGroup:
    """A group that `verifiers` rolls out and scores by itself, asking our policy's client."""

    builder: Any
    place: Place

    async def roll(self, policy: Policy) -> TrajectoryGroup:
        from tinker_cookbook.recipes.verifiers_rl.tinker_openai import TinkerAsyncOpenAIClient
        from tinker_cookbook.recipes.verifiers_rl.verifiers_env import (
            convert_states_to_trajectory_group,
        )
        from verifiers.utils.async_utils import maybe_semaphore

        renderer = self.place.renderer
        states = await self.builder.vf_env.run_group(
            group_inputs=self.builder.get_rollout_inputs(self.place.group_size),
            client=TinkerAsyncOpenAIClient(policy.client, renderer.renderer, renderer.tokenizer),
            model="tinker",
            gen_sampling_args={
                "max_tokens": self.place.max_tokens,
                "temperature": self.place.temperature,
            },
            gen_sem=await maybe_semaphore(-1),
            score_sem=await maybe_semaphore(-1),
        )
        group: TrajectoryGroup = convert_states_to_trajectory_group(states)
        for trajectory in group.trajectories_G:
            for turn in trajectory.transitions:
                policy.usage.prefill += turn.ob.length
                policy.usage.sampled += len(turn.ac.tokens)
                policy.usage.logprobs += sum(turn.ac.logprobs)
        return group

    def logging_tags(self) -> list[str]:
        tags: list[str] = self.builder.logging_tags()
        return tags


@dataclass(frozen=True)
class _Verifiers:
    builders: Sequence[Any]
    place: Place

    def batch(self, step: int) -> Sequence[Any]:
        place = self.place
        chosen = batch_of(self.builders, place.batch_size, step - 1, place.seed)
        return [_VerifiersGroup(builder, place) for builder in chosen]

    def held_out(self) -> Sequence[Any]:
        return ()


def _verifiers(name: str, args: Mapping[str, Any], place: Place) -> Environment:
    import verifiers
    from tinker_cookbook.recipes.verifiers_rl.verifiers_env import VerifiersEnvGroupBuilder

    with _refused(f"verifiers:{name}"):
        environment = verifiers.load_environment(name, **args)
        rows = environment.get_dataset(n=-1, seed=place.seed)
    builders = [
        VerifiersEnvGroupBuilder(
            vf_env=environment,
            prompt=row["prompt"],
            example_id=row["example_id"],
            task=row["task"],
            answer=row.get("answer", ""),
            info=row.get("info", {}),
        )
        for row in rows
    ]
    return _Verifiers(builders, place)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever foreign code raises
        raise InvalidInputError(
            f"environment={name!r} cannot be made: {type(error).__name__}: {str(error)[:300]}",
            next_step="Check its name and args.",
        ) from error
