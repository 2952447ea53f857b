"""The teacher of a distillation: its sampling client, and its answers, sampled once for all.

An answer is kept as soon as it is there, so that neither a crash nor a resume has the teacher
asked for it again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.attempt import Attempt, Outcome
from tinker_mcp.runs.distill_options import DistillOptions
from tinker_mcp.runs.policy.completer import Policy, Usage, seed_of
from tinker_mcp.runs.policy.rollouts import PromptGroup, roll
from tinker_mcp.runs.policy.tasks import together
from tinker_mcp.runs.prompts import Prompt
from tinker_mcp.training import datums, rendering, sessions
from tinker_mcp.training.formats import Conversation
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

FILE_NAME = "answers.jsonl"

_AT_ONCE = 64  # prompts
_UNBOUNDED = 2**31  # plan has seen to it that prompt and answer fit

SetName = Literal["train", "held_out"]


@contextlib.asynccontextmanager
async def opened(attempt: Attempt, options: DistillOptions) -> AsyncIterator[tinker.SamplingClient]:
    """A sampling client of the teacher, in a session of its own."""
    service = await anyio.to_thread.run_sync(sessions.open_service, attempt.backend, attempt.run_id)
    try:
        base_model = None if options.teacher_checkpoint else options.teacher_base_model
        pending = await anyio.to_thread.run_sync(
            lambda: service.create_sampling_client(
                model_path=options.teacher_checkpoint, base_model=base_model
            )
        )
        yield await attempt.answer(pending.coroutine())
    finally:
        await sessions.end([service], attempt.backend)


def instructed(
    messages: Sequence[Mapping[str, Any]], system_prompt: str | None
) -> list[Mapping[str, Any]]:
    """A prompt as the teacher gets it: its system prompt comes before the prompt's own."""
    if system_prompt is None:
        return list(messages)
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *messages]
    both = {**first, "content": f"{system_prompt}\n\n{first['content']}"}
    return [both, *messages[1:]]


@dataclass(frozen=True)
class Answer:
    """What the teacher said to a prompt.

    Attributes:
        set_name, prompt: Which one it answers.
        tokens: As sampled, the end of the turn included.
        message: As its renderer reads them.
        is_whole: Whether it came to its end within max_tokens.
    """

    set_name: SetName
    prompt: int
    sample: int
    tokens: Sequence[int]
    message: Mapping[str, Any]
    is_whole: bool


@dataclass
class Answers:
    """The answers of a run, in its folder.

    Args:
        path: Their file.
    """

    path: Path
    _kept: dict[tuple[SetName, int], list[Answer]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for answers in _read(self.path):
            self._kept[answers[0].set_name, answers[0].prompt] = answers

    def has(self, set_name: SetName, prompt: int) -> bool:
        """Whether a prompt's answers are there."""
        return (set_name, prompt) in self._kept

    def of(self, set_name: SetName) -> list[Answer]:
        """All of a set, in the order of its prompts."""
        keys = sorted(key for key in self._kept if key[0] == set_name)
        return [answer for key in keys for answer in self._kept[key]]

    def keep(self, answers: Sequence[Answer]) -> None:
        """Write the answers to one prompt, in one write."""
        line = json.dumps([_as_json(answer) for answer in answers]).encode()
        with self.path.open("ab", buffering=0) as file:
            file.write(line + b"\n")
            os.fsync(file.fileno())
        self._kept[answers[0].set_name, answers[0].prompt] = list(answers)


async def ask_for_all(attempt: Attempt, options: DistillOptions) -> Answers | Outcome:
    """All answers, after the teacher has given those that are missing; or how the run ends first.

    Raises:
        TinkerMcpError: The teacher cannot be asked. What it has answered is kept.
    """
    folder = attempt.journal.folder.path / "data"
    answers = await anyio.to_thread.run_sync(Answers, folder / FILE_NAME)
    prompts: dict[SetName, Sequence[Prompt]] = {
        "train": cast("Any", attempt.train),
        "held_out": cast("Any", attempt.held_out),
    }
    missing = [
        (name, place)
        for name, rows in prompts.items()
        for place in range(len(rows))
        if not answers.has(name, place)
    ]
    if not missing:
        return answers
    renderer = await anyio.to_thread.run_sync(
        rendering.load, attempt.backend, options.teacher_base_model, options.teacher_renderer
    )
    total = sum(map(len, prompts.values()))
    attempt.journal.note(f"The teacher answers {len(missing)} of {total} prompts.")
    async with opened(attempt, options) as client:
        asked = _Asked(attempt, options, client, renderer, answers)
        coming = ((name, place, prompts[name][place]) for name, place in missing)
        await attempt.answer(together([lambda: asked.one_by_one(coming)] * _AT_ONCE))
    return attempt.outcome or answers


@dataclass(frozen=True)
class _Asked:
    attempt: Attempt
    options: DistillOptions
    client: tinker.SamplingClient
    renderer: ModelRenderer
    answers: Answers

    async def one_by_one(self, coming: Iterator[tuple[SetName, int, Prompt]]) -> None:
        """Prompts that no other takes, until none is left or the run is to end."""
        for set_name, place, prompt in coming:
            group = self._group(set_name, prompt)
            bound = Usage(
                prefill=group.model_input.length * group.group_size,
                sampled=self.options.max_tokens * group.group_size,
            )
            if self._must_end(bound):
                return
            charge(self.attempt, bound, self.options)
            try:
                used = await self._one(group, set_name, place)
            except Exception:  # what is cancelled is computed, and billed, all the same
                charge(self.attempt, Usage(-bound.prefill, -bound.sampled), self.options)
                raise
            rest = Usage(used.prefill - bound.prefill, used.sampled - bound.sampled)
            charge(self.attempt, rest, self.options)

    def _group(self, set_name: SetName, prompt: Prompt) -> PromptGroup:
        told = Prompt(instructed(prompt.messages, self.options.system_prompt), prompt.row)
        return PromptGroup(told, self.renderer, _samples(set_name, self.options))

    async def _one(self, group: PromptGroup, set_name: SetName, place: int) -> Usage:
        policy = Policy(
            client=self.client,
            max_tokens=self.options.max_tokens,
            temperature=self.options.temperature,
            seed=seed_of(self.attempt.spec.seed, "teacher", set_name, place),
            context=_UNBOUNDED,
        )
        rolled = await roll(group, policy)
        said = [one.transitions[-1].ac for one in rolled.trajectories.trajectories_G]
        self.answers.keep(
            [
                _answer(self.renderer, set_name, place, sample, list(ac.tokens), ac.stop_reason)
                for sample, ac in enumerate(said)
            ]
        )
        return rolled.usage

    def _must_end(self, bound: Usage) -> bool:
        attempt, usd = self.attempt, bound.usd(self.options.of_teacher)
        if attempt.must_end(1, 0):
            return True
        limit = attempt.spec.max_usd
        if limit is not None and attempt.journal.spent_usd + usd > limit:
            attempt.outcome = Outcome(
                "stopped",
                "budget",
                f"The teacher's next answers could cost ${usd:.4f}, and of max_usd ${limit:.2f} "
                f"${attempt.journal.spent_usd:.4f} are spent. Those it has given are kept.",
            )
        return attempt.outcome is not None


def charge(attempt: Attempt, usage: Usage, options: DistillOptions) -> None:
    """Count what the teacher samples."""
    tokens = round(usage.prefill) + usage.sampled
    attempt.journal.spend(tokens, usage.usd(options.of_teacher))


def _samples(set_name: SetName, options: DistillOptions) -> int:
    return options.group_size if set_name == "train" else 1


def _answer(
    renderer: ModelRenderer,
    set_name: SetName,
    place: int,
    sample: int,
    tokens: list[int],
    stop_reason: str,
) -> Answer:
    message, ending = renderer.renderer.parse_response(tokens)
    is_whole = stop_reason == "stop" and ending.is_clean
    return Answer(set_name, place, sample, tokens, cast("Any", message), is_whole)


# What the student learns


def datums_of(
    rows: Sequence[Prompt],
    answers: Sequence[Answer],
    student: ModelRenderer,
    options: DistillOptions,
    max_length: int,
) -> tuple[list[tinker.Datum], int]:
    """Datums of cross_entropy, the answers' tokens trained; how many answers gave none. Blocks.

    With the student's own tokens an answer is learned as it was sampled, and one that max_tokens
    cut teaches no end. Of another tokenizer the text is rendered again, where it came to an end.
    """
    made = []
    for answer in answers:
        messages = rows[answer.prompt].messages
        if options.has_same_tokenizer:
            found = _of_tokens(student.prompt(cast("Any", messages)), answer, max_length)
        else:
            found = _of_text(messages, answer, student, max_length)
        if found is not None:
            made.append(found)
    return made, len(answers) - len(made)


def _of_tokens(prompt: tinker.ModelInput, answer: Answer, max_length: int) -> tinker.Datum | None:
    import tinker
    import torch
    from tinker_cookbook.supervised.common import datum_from_model_input_weights

    said = tinker.EncodedTextChunk(tokens=list(answer.tokens))
    whole = tinker.ModelInput(chunks=[*prompt.chunks, said])
    if not answer.tokens or whole.length > max_length:
        return None
    weights = torch.tensor([0.0] * prompt.length + [1.0] * len(answer.tokens))
    return datum_from_model_input_weights(whole, weights, max_length=max_length, reduction="none")


def _of_text(
    messages: Sequence[Mapping[str, Any]], answer: Answer, student: ModelRenderer, max_length: int
) -> tinker.Datum | None:
    if not answer.is_whole:
        return None
    said = Conversation("", [*messages, answer.message])
    try:
        datum, cut = datums.supervised_datum(
            said, student, "last_assistant_message", max_length, "none"
        )
    except InvalidInputError:
        return None
    return None if cut else datum


# The file


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "set": answer.set_name,
        "prompt": answer.prompt,
        "sample": answer.sample,
        "tokens": list(answer.tokens),
        "message": answer.message,
        "is_whole": answer.is_whole,
    }


def _read(path: Path) -> Iterator[list[Answer]]:
    """A prompt's answers a line; a line that a kill tore is cut off. Blocks."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    for line in content[:whole].splitlines():
        yield [
            Answer(
                set_name=one["set"],
                prompt=one["prompt"],
                sample=one["sample"],
                tokens=one["tokens"],
                message=one["message"],
                is_whole=one["is_whole"],
            )
            for one in json.loads(line)
        ]
