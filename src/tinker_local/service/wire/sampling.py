"""asample: its request in JSON, its result in protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError
from tinker_local.ops import (
    Floats,
    Image,
    Sample,
    SampledSequence,
    SampleOutput,
    SamplerWeights,
    Tokens,
    TokenScores,
)
from tinker_local.service.futures import Reply
from tinker_local.service.wire.arrays import tensor
from tinker_local.service.wire.images import Part, joined
from tinker_local.service.wire.replies import PROTO

TargetTokens: TypeAlias = Any
"""What SampleRequest.target_prompt_logprobs holds; the SDK keeps its type to itself."""


def sample_op(request: types.SampleRequest, weights: SamplerWeights) -> Sample:
    """Translate an asample request.

    Raises:
        NotServedError: An option that tinker-local has not, by name.
        UserInputError: Targets whose sizes do not agree.
    """
    if request.record_stability_info:
        raise NotServedError(
            "tinker-local does not serve record_stability_info: only stable_reinforce uses it.",
            "Leave it out.",
        )
    params = request.sampling_params
    prompt, images = joined([_part(chunk) for chunk in request.prompt.chunks])
    stop_tokens, stop_strings = _stops(params.stop)
    targets = request.target_prompt_logprobs
    return Sample(
        weights=weights,
        prompt=prompt,
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        top_sampled=request.topk_sample_logprobs,
        prompt_logprobs=bool(request.prompt_logprobs),
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        top_prompt=request.topk_prompt_logprobs,
        prompt_targets=None if targets is None else _targets(targets),
        prompt_alternatives=request.prompt_alt_tokens_k,
        images=images,
    )


def sample_reply(output: SampleOutput, request: types.SampleRequest) -> Reply:
    """Encode as a SampleResponse; targets are scored in the layout in which they were asked."""
    message = pb.SampleResponse(
        sequences=[_sequence(sequence) for sequence in output.sequences],
        prompt_cache_hit_tokens=output.cached_tokens,
    )
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs.tobytes()
    if output.prompt_top is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(output.prompt_top))
    if output.prompt_targets is not None and request.target_prompt_logprobs is not None:
        scores = _target_scores(output.prompt_targets, request.target_prompt_logprobs)
        message.target_prompt_logprobs.CopyFrom(scores)
    if output.prompt_alternatives is not None:
        drawn = output.prompt_alternatives
        tokens = drawn.tokens.astype(np.int32)
        shape = tokens.shape
        message.prompt_alt_tokens.tokens.CopyFrom(
            pb.Tensor(dense=tokens.tobytes(), dtype=pb.DTYPE_INT32, shape=shape)
        )
        message.prompt_alt_tokens.logprobs.CopyFrom(
            pb.Tensor(dense=drawn.logprobs.tobytes(), dtype=pb.DTYPE_FLOAT32, shape=shape)
        )
    return Reply(message.SerializeToString(), PROTO)


def _sequence(sequence: SampledSequence) -> pb.SampledSequence:
    message = pb.SampledSequence(
        stop_reason=pb.STOP_REASON_STOP if sequence.is_stopped else pb.STOP_REASON_LENGTH,
        tokens=sequence.tokens.astype(np.int32).tobytes(),
        logprobs=sequence.logprobs.tobytes(),
    )
    if sequence.top is not None:
        message.topk_sampled_logprobs.CopyFrom(_top(sequence.top))
    return message


def _top(scores: TokenScores) -> pb.TopkLogprobs:
    length, count = scores.tokens.shape
    return pb.TopkLogprobs(
        token_ids=scores.tokens.astype(np.int32).tobytes(),
        logprobs=scores.logprobs.tobytes(),
        k=count,
        length=length,
    )


def _targets(targets: TargetTokens) -> Tokens:
    """Token ids asked at each prompt position, dense, -1 where nothing is."""
    # What a sparse tensor leaves out becomes 0; counted from 1, that is no token.
    from_one = np.array(targets.data, dtype=np.int64) + 1
    message = pb.Tensor(dtype=pb.DTYPE_INT64, shape=targets.shape or [len(from_one)])
    if targets.sparse_crow_indices is None:
        message.dense = from_one.tobytes()
    else:
        message.sparse_csr.values = from_one.tobytes()
        message.sparse_csr.crow_indices = _int64_bytes(targets.sparse_crow_indices)
        message.sparse_csr.col_indices = _int64_bytes(targets.sparse_col_indices or [])
    dense: Tokens = tensor(message, "target_prompt_logprobs").astype(np.int64) - 1
    return dense


def _target_scores(scores: Floats, asked: TargetTokens) -> pb.Tensor:
    message = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=scores.shape)
    if asked.sparse_crow_indices is None:
        message.dense = scores.tobytes()
        return message
    rows = np.repeat(np.arange(len(scores)), np.diff(asked.sparse_crow_indices))
    message.sparse_csr.values = scores[rows, asked.sparse_col_indices or []].tobytes()
    message.sparse_csr.crow_indices = _int64_bytes(asked.sparse_crow_indices)
    message.sparse_csr.col_indices = _int64_bytes(asked.sparse_col_indices or [])
    return message


def _int64_bytes(values: Sequence[int]) -> bytes:
    return np.array(values, dtype=np.int64).tobytes()


def _part(chunk: types.ModelInputChunk) -> Part:
    if isinstance(chunk, types.EncodedTextChunk):
        return np.array(chunk.tokens, dtype=np.int64)
    if isinstance(chunk, types.ImageChunk):
        return Image(0, chunk.data, chunk.format, chunk.expected_tokens)
    if isinstance(chunk, types.ImageAssetPointerChunk):
        raise NotServedError(
            f"The prompt points to the image {chunk.location[:80]!r}; tinker-local fetches none.",
            "Read the file and send it as an ImageChunk.",
        )
    raise NotServedError(
        f"The prompt holds a chunk of the type {chunk.type!r}; tinker-local's models read text "
        "only, some of them images.",
        "Send encoded text.",
    )


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
