"""What is computed: the same tokens for both sides. Knows nothing of servers or processes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

RENDERER = "qwen3_instruct"
SEED = 0

LossFn = Literal["cross_entropy", "importance_sampling"]


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        conversations: Conversations a supervised batch.
        groups, group_size: Completions of one RL batch, by prompt.
        sample_counts: Sequences drawn from one prompt, one measurement each.
        new_tokens: Length of every sampled sequence.
        clients: Sampling clients at once.
        alone_s, together_s: How long training and sampling are watched, alone and together.
    """

    conversations: int = 32
    groups: int = 8
    group_size: int = 8
    rl_prompt_tokens: int = 200
    completion_tokens: tuple[int, int] = (40, 80)
    sample_counts: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 100
    new_tokens: int = 64
    clients: int = 16
    alone_s: float = 10.0
    together_s: float = 20.0


FULL = Sizes()
QUICK = Sizes(
    conversations=8,
    groups=2,
    group_size=4,
    sample_counts=(1, 8),
    new_tokens=16,
    clients=4,
    alone_s=2.0,
    together_s=4.0,
)


@dataclass(frozen=True)
class Example:
    """One datum: tokens (N), the token that follows each (N), further loss inputs (N each)."""

    tokens: Sequence[int]
    targets: Sequence[int]
    inputs: Mapping[str, Sequence[float]]

    @property
    def counts(self) -> list[bool]:
        """Which positions (N) change the loss."""
        factor = self.inputs["weights" if "weights" in self.inputs else "advantages"]
        return [value != 0 for value in factor]


@dataclass(frozen=True)
class Batch:
    """The data of one forward_backward.

    Attributes:
        groups: The examples, as the plain loop takes them: one padded batch each.
        shared_tokens: Length of the prompt that all examples of a group have in common.
    """

    loss_fn: LossFn
    groups: Sequence[Sequence[Example]]
    shared_tokens: int = 0

    @property
    def examples(self) -> list[Example]:
        return list(itertools.chain.from_iterable(self.groups))

    @property
    def tokens(self) -> int:
        """Tokens without padding; a shared prompt counts once for each example."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def distinct_tokens(self) -> int:
        """Tokens, with a shared prompt counted once a group."""
        return self.tokens - self.shared_tokens * sum(len(group) - 1 for group in self.groups)

    @property
    def counted_tokens(self) -> int:
        """Positions that change the loss."""
        return sum(sum(example.counts) for example in self.examples)


@dataclass(frozen=True)
class Workloads:
    """All data of a run.

    Attributes:
        supervised: Batches of real conversations, in the file's order.
        rl: One batch; each group's completions follow one prompt.
        prompts: Different prompts of `Sizes.prompt_tokens` tokens, one a client.
    """

    sizes: Sizes
    supervised: Sequence[Batch]
    rl: Batch
    prompts: Sequence[Sequence[int]]

    @property
    def warm_up(self) -> Batch:
        """A small part of the first supervised batch."""
        return Batch("cross_entropy", [self.supervised[0].groups[0][:8]])

    @property
    def rl_warm_up(self) -> Batch:
        return Batch(self.rl.loss_fn, self.rl.groups[:1], self.rl.shared_tokens)


def make(model_folder: Path, sizes: Sizes) -> Workloads:
    """Render the cookbook's example conversations with the model's own tokenizer."""
    rendered = _rendered_conversations(model_folder)
    examples = [_supervised(tokens, weights) for tokens, weights in rendered]
    batches = [
        Batch("cross_entropy", [examples[start : start + sizes.conversations]])
        for start in range(0, len(examples) - sizes.conversations + 1, sizes.conversations)
    ]
    text = list(itertools.chain.from_iterable(tokens for tokens, _ in rendered))
    return Workloads(
        sizes=sizes,
        supervised=batches,
        rl=_rl_batch(text, sizes),
        prompts=list(itertools.islice(_pieces(text, sizes.prompt_tokens), sizes.clients)),
    )


def _rendered_conversations(model_folder: Path) -> list[tuple[list[int], list[float]]]:
    """Tokens (N) and weights (N, 1 on the assistant's tokens) of each conversation."""
    import tinker_cookbook
    from tinker_cookbook.renderers import TrainOnWhat, get_renderer
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    renderer = get_renderer(RENDERER, tokenizer)
    file = Path(tinker_cookbook.__file__).parent / "example_data" / "conversations.jsonl"
    rendered = []
    for line in file.read_text("utf-8").splitlines():
        model_input, weights = renderer.build_supervised_example(
            json.loads(line)["messages"], TrainOnWhat.ALL_ASSISTANT_MESSAGES
        )
        rendered.append((model_input.to_ints(), [float(weight) for weight in weights]))
    return rendered


def _supervised(tokens: list[int], weights: list[float]) -> Example:
    return Example(tokens[:-1], tokens[1:], {"weights": weights[1:]})


def _rl_batch(text: Sequence[int], sizes: Sizes) -> Batch:
    """Groups whose completions are pieces of other text, with random advantages."""
    random = np.random.default_rng(SEED)
    prompts = itertools.islice(_pieces(text, sizes.rl_prompt_tokens), sizes.groups)
    groups = [
        [_rollout(prompt, text, sizes, random) for _ in range(sizes.group_size)]
        for prompt in prompts
    ]
    return Batch("importance_sampling", groups, sizes.rl_prompt_tokens)


def _rollout(
    prompt: Sequence[int], text: Sequence[int], sizes: Sizes, random: np.random.Generator
) -> Example:
    """A prompt and a completion; as in the cookbook, the prompt's targets have advantage 0."""
    shortest, longest = sizes.completion_tokens
    length = int(random.integers(shortest, longest + 1))
    start = int(random.integers(0, len(text) - length))
    tokens = [*prompt, *text[start : start + length]]
    unscored = [0.0] * (len(prompt) - 1)
    # Whatever the model says, the ratio exp(lp - q) stays below e^6.
    logprobs = random.uniform(-6, -2, length).tolist()
    advantages = [float(random.choice([-1.0, 1.0]))] * length
    inputs = {"logprobs": [*unscored, *logprobs], "advantages": [*unscored, *advantages]}
    return Example(tokens[:-1], tokens[1:], inputs)


def _pieces(text: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """Neighbouring pieces of so many tokens."""
    for start in range(0, len(text) - length + 1, length):
        yield text[start : start + length]
