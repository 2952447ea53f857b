"""Tasks of reasoning-gym, each with its own grader."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.policy.environments.place import (
    HELD_OUT_GROUPS,
    Environment,
    Place,
    refused,
)
from tinker_mcp.runs.policy.rollouts import PromptGroup
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.training.loop import batch_of
from tinker_mcp.training.rewards.contract import Completion, Row, Scored

_PROBLEMS = 1000  # of a task where `size` is not given
_PROBLEMS_A_HELD_OUT = 10


def check(name: str) -> None:
    """Whether there is such a task.

    Raises:
        InvalidInputError: There is none.
    """
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
        raise InvalidInputError(
            f"reasoning-gym has no task {name!r} among its {len(DATASETS)}.",
            next_step=f"Use one of them, such as {', '.join(close)}.",
        )


def opened(name: str, args: Mapping[str, Any], place: Place) -> Environment:
    """A task's problems, of which one in ten is held out.

    Raises:
        InvalidInputError: It cannot be made with these arguments.
    """
    import reasoning_gym

    given = {"size": _PROBLEMS, "seed": place.seed, **args}
    with refused(f"reasoning_gym:{name}"):
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
