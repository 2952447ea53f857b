"""asample: its request in JSON, its result in protobuf."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError
from tinker_local.ops import Sample, SampleOutput, SamplerWeights, Tokens
from tinker_local.service.futures import Reply
from tinker_local.service.wire.replies import PROTO


def sample_op(request: types.SampleRequest, weights: SamplerWeights) -> Sample:
    """Translate an asample request.

    Raises:
        NotServedError: An option that tinker-local has not, by name.
    """
    for name in (
        "topk_prompt_logprobs",
        "topk_sample_logprobs",
        "target_prompt_logprobs",
        "prompt_alt_tokens_k",
        "prompt_logprobs_last_n",
        "record_stability_info",
    ):
        if getattr(request, name):
            raise NotServedError(f"tinker-local does not serve {name}.", "Leave it out.")
    params = request.sampling_params
    stop_tokens, stop_strings = _stops(params.stop)
    return Sample(
        weights=weights,
        prompt=_prompt(request.prompt),
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        prompt_logprobs=bool(request.prompt_logprobs),
    )


def sample_reply(output: SampleOutput) -> Reply:
    """Encode as a SampleResponse."""
    sequences = [
        pb.SampledSequence(
            stop_reason=pb.STOP_REASON_STOP if s.is_stopped else pb.STOP_REASON_LENGTH,
            tokens=s.tokens.astype(np.int32).tobytes(),
            logprobs=s.logprobs.tobytes(),
        )
        for s in output.sequences
    ]
    message = pb.SampleResponse(sequences=sequences)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs.tobytes()
    return Reply(message.SerializeToString(), PROTO)


def _prompt(prompt: types.ModelInput) -> Tokens:
    try:
        return np.array(prompt.to_ints(), dtype=np.int64)
    except ValueError:
        raise NotServedError(
            "The prompt holds images or audio.", "tinker-local's models read text only."
        ) from None


def _stops(
    stop: str | Sequence[str] | Sequence[int] | None,
) -> tuple[Sequence[int] | None, Sequence[str]]:
    """Split Tinker's `stop` into (tokens, strings).

    None keeps the end-of-text ids, strings are watched for beside them, and a list of ids, even
    an empty one, takes their place (SDK 0.38, `SamplingParams.stop`).
    """
    if stop is None:
        return None, ()
    if isinstance(stop, str):
        return None, (stop,)
    tokens = [item for item in stop if isinstance(item, int)]
    strings = [item for item in stop if isinstance(item, str)]
    return (None if strings else tokens), strings
