"""What a request for samples is refused for, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import replace

from tinker_local.engine.base_model import LanguageModel
from tinker_local.errors import UserInputError
from tinker_local.ops import Sample

MOST_SAMPLES = 128
MOST_SCORES = 1024  # tokens scored a position

SDK_NAMES = {
    "top_prompt": "topk_prompt_logprobs",
    "top_sampled": "topk_sample_logprobs",
    "prompt_alternatives": "prompt_alt_tokens_k",
}


def check(op: Sample, model: LanguageModel) -> Sample:
    """Refuse a request that cannot work.

    Returns:
        It, with the tokens of images among the prompt's others.

    Raises:
        UserInputError: The first argument out of range, with its value.
    """
    prompt, images = model.laid_out(op.prompt, op.images, "The prompt")
    op = replace(op, prompt=prompt, images=images)
    limit = model.info.max_context_length
    length = len(op.prompt)
    if not 0 < length < limit:
        raise UserInputError(
            f"The prompt has {length} tokens; {model.info.name} takes 1 to {limit - 1}.",
            "Shorten the prompt.",
        )
    outside = op.prompt[(op.prompt < 0) | (op.prompt >= model.vocabulary)]
    rules = (
        (outside.size == 0, f"token ids {outside[:3].tolist()}", f"below {model.vocabulary}"),
        (
            1 <= op.num_samples <= MOST_SAMPLES,
            f"num_samples {op.num_samples}",
            f"1 to {MOST_SAMPLES}",
        ),
        (op.max_tokens is None or op.max_tokens > 0, f"max_tokens {op.max_tokens}", "at least 1"),
        (0 <= op.temperature < math.inf, f"temperature {op.temperature}", "0 or more"),
        (op.top_k == -1 or op.top_k > 0, f"top_k {op.top_k}", "-1 or at least 1"),
        (0 < op.top_p <= 1, f"top_p {op.top_p}", "above 0, at most 1"),
        (op.seed is None or 0 <= op.seed < 2**63, f"seed {op.seed}", "0 to 2**63 - 1"),
        (all(op.stop_strings), f"stop strings {list(op.stop_strings)}", "no empty ones"),
    )
    for is_valid, value, allowed in rules:
        if not is_valid:
            raise UserInputError(f"{value}: out of range.", f"Allowed: {allowed}.")
    _check_scores(op, model.vocabulary)
    return op


def _check_scores(op: Sample, vocabulary: int) -> None:
    for name in ("top_prompt", "top_sampled", "prompt_alternatives"):
        count = getattr(op, name)
        if not 0 <= count <= min(MOST_SCORES, vocabulary):
            raise UserInputError(
                f"{SDK_NAMES[name]} is {count}.", f"Use 0 to {min(MOST_SCORES, vocabulary)}."
            )
    last_n, length = op.prompt_logprobs_last_n, len(op.prompt)
    if last_n is not None and not (op.prompt_logprobs and 1 <= last_n < length):
        raise UserInputError(
            f"prompt_logprobs_last_n is {last_n}, the prompt has {length} tokens.",
            f"Ask for prompt_logprobs as well, and for 1 to {length - 1} of them.",
        )
    if op.prompt_targets is None:
        return
    shape = op.prompt_targets.shape
    if len(shape) != 2 or shape[0] != length - 1:
        raise UserInputError(
            f"target_prompt_logprobs has the shape {list(shape)}; the prompt has {length} tokens.",
            f"Give it the shape [{length - 1}, K]: row i is asked at prompt token i + 1.",
        )
    outside = op.prompt_targets[(op.prompt_targets < -1) | (op.prompt_targets >= vocabulary)]
    if outside.size:
        raise UserInputError(
            f"target_prompt_logprobs holds token id {int(outside[0])}.",
            f"Use 0 to {vocabulary - 1}, or -1 where nothing is asked.",
        )
