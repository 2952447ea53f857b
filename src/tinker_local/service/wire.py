"""Bytes <-> ops: the only file that touches protobuf.

The messages are the SDK's own (`tinker.proto`), as are the JSON requests (`tinker.types`), so
both ends agree by construction on SDK 0.38.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import (
    ForwardBackward,
    LossOutput,
    Sample,
    SampleOutput,
    SamplerWeights,
    Tokens,
    TrainingDatum,
)
from tinker_local.service.futures import Failure, Reply

MAX_BODY_BYTES = 64 * 2**20
"""The SDK splits a forward_backward at 5 MB; anything near this limit is no SDK's."""

_PROTO = "application/x-protobuf"
_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype(np.float32),
    pb.DTYPE_INT64: np.dtype(np.int64),
    pb.DTYPE_INT32: np.dtype(np.int32),
}


def json_reply(value: Mapping[str, object]) -> Reply:
    return Reply(json.dumps(value).encode(), "application/json")


def failure_body(failure: Failure) -> dict[str, str]:
    """What retrieve_future answers, with HTTP 200, for a request that failed."""
    return {"error": failure.error, "category": failure.category}


def decompress(body: bytes) -> bytes:
    """Undo the SDK's zstd.

    Raises:
        UserInputError: Not zstd, or more than MAX_BODY_BYTES when unpacked.
    """
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(MAX_BODY_BYTES + 1)
    except zstandard.ZstdError as error:
        raise UserInputError(f"The body is not zstd: {error}.", "Send it plain.") from None
    if len(plain) > MAX_BODY_BYTES:
        raise UserInputError("The body unpacks to over 64 MiB.", "Send fewer datums at once.")
    return plain


def parse_forward_backward(body: bytes) -> pb.ForwardBackwardRequest:
    """Read the message's frame: model_id and seq_id can be trusted, the data not yet.

    Raises:
        UserInputError: Not such a message.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise UserInputError(
            "The body is no ForwardBackwardRequest in protobuf.", "Use the tinker SDK 0.38."
        ) from None
    return message


def forward_backward_op(message: pb.ForwardBackwardRequest) -> ForwardBackward:
    """Read all of the message.

    Raises:
        UserInputError: Data of a wrong size or shape, naming the datum.
        NotServedError: Images, audio or provenance spans.
    """
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.HasField("text") else value.number
    return ForwardBackward(
        model_id=message.model_id,
        data=[_datum(position, datum) for position, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=config,
        forward_only=message.forward_only,
    )


def loss_reply(output: LossOutput) -> Reply:
    """Encode per-datum log-probabilities and metrics as a ForwardBackwardOutput."""
    record = pb.ArrayRecord(type_tag="ArrayRecord", num_datums=len(output.logprobs))
    offsets = np.cumsum([0, *(array.nbytes for array in output.logprobs)], dtype=np.int64)
    record.fields["logprobs"].data = b"".join(array.tobytes() for array in output.logprobs)
    record.fields["logprobs"].offsets = offsets.tobytes()
    record.fields["logprobs"].dtype = pb.DTYPE_FLOAT32
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics=dict(output.metrics)
    )
    return Reply(message.SerializeToString(), _PROTO)


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
    return Reply(message.SerializeToString(), _PROTO)


def _datum(position: int, datum: pb.Datum) -> TrainingDatum:
    place = f"data[{position}]"
    if datum.model_input_spans or datum.loss_fn_input_spans:
        raise NotServedError(f"{place} carries provenance spans.", "Send the datum without them.")
    chunks = []
    for chunk in datum.model_input:
        if not chunk.HasField("encoded_text"):
            raise NotServedError(
                f"{place} holds a {chunk.WhichOneof('chunk') or 'chunk without content'}.",
                "tinker-local's models read text only: send encoded text.",
            )
        chunks.append(_array(chunk.encoded_text.tokens, np.dtype(np.int32), place))
    tokens: Tokens = np.concatenate([np.empty(0, np.int32), *chunks]).astype(np.int64)
    inputs = {
        name: _tensor(tensor, f"{place}.loss_fn_inputs[{name!r}]")
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return TrainingDatum(tokens, inputs)


def _tensor(tensor: pb.Tensor, place: str) -> NDArray[np.generic]:
    """int64 or float32, in the shape that came with it."""
    if tensor.dtype not in _DTYPES:
        raise UserInputError(f"{place} has dtype {tensor.dtype}.", "Send float32 or int64.")
    if tensor.HasField("sparse_csr"):
        raise NotServedError(f"{place} is sparse.", "Send one target a position, shape (N,).")
    values = _array(tensor.dense, _DTYPES[tensor.dtype], place)
    if tensor.dtype == pb.DTYPE_INT32:
        values = values.astype(np.int64)
    shape = tuple(tensor.shape) or values.shape
    if int(np.prod(shape)) != values.size:
        raise UserInputError(
            f"{place} has {values.size} values for the shape {list(shape)}.", "Make them agree."
        )
    return values.reshape(shape)


def _array(data: bytes, dtype: np.dtype[Any], place: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise UserInputError(
            f"{place} has {len(data)} bytes, no whole number of {dtype}.", "Use the tinker SDK."
        )
    return np.frombuffer(data, dtype=dtype).copy()  # frombuffer alone is read-only


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
