"""The cookbook's own training programs, configured for a model and data that are on this machine.

    python tests/cookbook_recipes.py '{"recipe": "sft", "model": "tinker-local/tiny", ...}'

A program of its own, since the cookbook logs to stdout, keeps traces in globals and calls what
SDK 0.38 deprecates. It knows nothing of `tinker_local`: TINKER_BASE_URL and TINKER_API_KEY lead
it to a server, as they would to any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RENDERER = "qwen3_instruct"  # ChatML, which the tiny model and SmolLM2 speak

# Chosen and rejected answers differ in one habit each, so that a preference can be seen.
COMPARISONS = tuple(
    (f"Name {what}.", chosen, rejected)
    for what, chosen, rejected in (
        ("a colour", "Red.", "I would rather not say which one."),
        ("a fruit", "An apple.", "There are a great many of them."),
        ("a city", "Paris.", "It depends on what you like."),
        ("a river", "The Nile.", "Rivers are long and there are many."),
        ("a metal", "Iron.", "Metals are found in the ground."),
        ("a bird", "An owl.", "Some of them can not even fly."),
        ("a number", "Seven.", "Numbers go on without an end."),
        ("a season", "Winter.", "They come one after the other."),
    )
)
PROMPTS = tuple(f"Name {what}." for what in ("a tree", "a fish", "a tool", "a planet"))


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        batch_size: Conversations, pairs or groups a step.
        max_tokens: Of a conversation, or of a sampled answer.
        max_steps_off_policy: Of the asynchronous RL alone.
        start: A tinker:// path of state to begin from; None for `model` itself.
        teacher: A tinker:// path of sampler weights; None for `model` itself.
    """

    recipe: str
    model: str
    log_path: str
    steps: int
    batch_size: int
    max_tokens: int
    learning_rate: float
    group_size: int = 4
    rank: int = 8
    max_steps_off_policy: int = 2
    start: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Finished:
    """A recipe that ended well.

    Attributes:
        steps: The lines of `metrics.jsonl` that tell of a training step, in order.
        checkpoints: The lines of `checkpoints.jsonl`.
        seconds: From its first request to its end; the cookbook was imported before.
    """

    steps: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    seconds: float

    def series(self, name: str) -> list[float]:
        """The values of a metric, one for each step that has it."""
        return [step[name] for step in self.steps if name in step]


def run_recipe(plan: Plan, server_env: Mapping[str, str], timeout_s: float) -> Finished:
    """Run it to its end in a process of its own.

    Raises:
        AssertionError: It failed; holds the end of what it said.
        subprocess.TimeoutExpired: It took longer than `timeout_s`.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, json.dumps(asdict(plan))],
        env={**os.environ, **server_env, "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    folder = Path(plan.log_path)
    return Finished(
        _lines(folder / "metrics.jsonl"),
        _lines(folder / "checkpoints.jsonl"),
        float((folder / "seconds").read_text()),
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def supervised(plan: Plan) -> None:
    """`supervised.train` on the conversations that the cookbook ships, eight of them held out."""
    import tinker_cookbook
    from tinker_cookbook.supervised import train
    from tinker_cookbook.supervised.data import FromConversationFileBuilder

    examples = Path(tinker_cookbook.__file__).parent / "example_data" / "conversations.jsonl"
    config = train.Config(
        **_everywhere(plan),
        dataset_builder=FromConversationFileBuilder(
            file_path=str(examples), test_size=8, common_config=_chat_config(plan)
        ),
        lora_rank=plan.rank,
        lr_schedule="constant",
        eval_every=max(1, plan.steps - 1),
        save_every=max(1, plan.steps // 2),
    )
    with _timed(plan):
        asyncio.run(train.main(config))


def reinforced(plan: Plan) -> None:
    """`rl.train`: each step samples, then trains."""
    from tinker_cookbook.rl import train

    with _timed(plan):
        asyncio.run(train.main(train.Config(**_arithmetic(plan))))


def reinforced_async(plan: Plan) -> None:
    """`rl.train` that samples while it trains."""
    from tinker_cookbook.rl import train

    async_config = train.AsyncConfig(
        max_steps_off_policy=plan.max_steps_off_policy, groups_per_batch=plan.batch_size
    )
    with _timed(plan):
        asyncio.run(train.main(train.Config(**_arithmetic(plan), async_config=async_config)))


def preferred(plan: Plan) -> None:
    """`preference.train_dpo` on COMPARISONS, again and again."""
    from tinker_cookbook.preference import train_dpo
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl

    file = Path(plan.log_path).with_name("comparisons.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in _comparison_rows()), "utf-8")
    config = train_dpo.Config(
        **_everywhere(plan),
        dataset_builder=DPODatasetBuilderFromComparisons(
            comparison_builder=ComparisonBuilderFromJsonl(train_path=str(file)),
            common_config=_chat_config(plan),
        ),
        lora_rank=plan.rank,
        lr_schedule="constant",
        num_epochs=math.ceil(plan.steps * plan.batch_size / len(COMPARISONS)),
        save_every=max(1, plan.steps // 2),
        eval_every=0,
        infrequent_eval_every=0,
    )
    with _timed(plan):
        train_dpo.main(config)


def distilled(plan: Plan) -> None:
    """`distillation.train_on_policy` of PROMPTS towards the teacher."""
    import chz
    from tinker_cookbook import renderers
    from tinker_cookbook.distillation import train_on_policy
    from tinker_cookbook.distillation.datasets import (
        DistillationDatasetConfig,
        PromptOnlyDataset,
        TeacherConfig,
    )
    from tinker_cookbook.rl.types import RLDatasetBuilder
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    @chz.chz
    class LocalPrompts(RLDatasetBuilder):
        """The cookbook's own builder loads its prompts from the hub."""

        async def __call__(self) -> tuple[PromptOnlyDataset, None]:
            tokenizer = get_tokenizer(plan.model)
            prompts = [PROMPTS[n % len(PROMPTS)] for n in range(plan.steps * plan.batch_size)]
            dataset = PromptOnlyDataset(
                prompts=prompts,
                batch_size=plan.batch_size,
                group_size=plan.group_size,
                renderer=renderers.get_renderer(RENDERER, tokenizer=tokenizer),
                tokenizer=tokenizer,
            )
            return dataset, None

    config = train_on_policy.Config(
        **_everywhere(plan),
        dataset_configs=[
            DistillationDatasetConfig(
                dataset_builder=LocalPrompts(),
                teacher_config=TeacherConfig(
                    base_model=plan.model, load_checkpoint_path=plan.teacher
                ),
                groups_per_batch=plan.batch_size,
            )
        ],
        max_tokens=plan.max_tokens,
        lora_rank=plan.rank,
        save_every=max(1, plan.steps // 2),
        eval_every=0,
    )
    with _timed(plan):
        asyncio.run(train_on_policy.main(config))


@contextlib.contextmanager
def _timed(plan: Plan) -> Iterator[None]:
    """Note the seconds that a recipe took, without those of importing it."""
    began = time.perf_counter()
    yield
    (Path(plan.log_path) / "seconds").write_text(str(time.perf_counter() - began))


def _everywhere(plan: Plan) -> dict[str, Any]:
    """What each recipe's Config has."""
    return {
        "recipe_name": f"local_{plan.recipe.replace('-', '_')}",
        "model_name": plan.model,
        "load_checkpoint_path": plan.start,
        "renderer_name": RENDERER,
        "log_path": plan.log_path,
        "learning_rate": plan.learning_rate,
        "base_url": os.environ["TINKER_BASE_URL"],
        "max_steps": plan.steps,
    }


def _chat_config(plan: Plan) -> Any:
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=plan.model,
        renderer_name=RENDERER,
        max_length=plan.max_tokens,
        batch_size=plan.batch_size,
    )


def _arithmetic(plan: Plan) -> dict[str, Any]:
    from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder

    dataset_builder = ArithmeticDatasetBuilder(
        batch_size=plan.batch_size,
        model_name_for_tokenizer=plan.model,
        renderer_name=RENDERER,
        n_batches=plan.steps,
        group_size=plan.group_size,
    )
    return {
        **_everywhere(plan),
        "dataset_builder": dataset_builder,
        "max_tokens": plan.max_tokens,
        "lora_rank": plan.rank,
        "save_every": max(1, plan.steps // 2),
        "eval_every": 0,
    }


def _comparison_rows() -> list[dict[str, Any]]:
    """Rows as the cookbook's `combine_preference_datasets` writes them; A is the better."""

    def message(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return [
        {
            "comparison": {
                "prompt_conversation": message("user", prompt),
                "completion_A": message("assistant", chosen),
                "completion_B": message("assistant", rejected),
            },
            "label": "A",
        }
        for prompt, chosen, rejected in COMPARISONS
    ]


RECIPES: dict[str, Callable[[Plan], None]] = {
    "sft": supervised,
    "rl": reinforced,
    "rl-async": reinforced_async,
    "dpo": preferred,
    "distill": distilled,
}


if __name__ == "__main__":
    _plan = Plan(**json.loads(sys.argv[1]))
    RECIPES[_plan.recipe](_plan)
