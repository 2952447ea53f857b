"""forward_backward: its request in protobuf, its result in protobuf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import ForwardBackward, Image, LossOutput, TrainingDatum
from tinker_local.service.futures import Reply
from tinker_local.service.wire.arrays import array, array_records, tensor
from tinker_local.service.wire.images import Part, joined
from tinker_local.service.wire.replies import PROTO

ForwardBackwardRequest: TypeAlias = pb.ForwardBackwardRequest

MAX_BODY_BYTES = 64 * 2**20
"""The SDK splits a forward_backward at 5 MB; anything near this limit is no SDK's."""

MAX_SPARSE_VALUES = 2**26
"""Of all sparse tensors of a request in dense form, 512 MiB of int64; the SDK counts their bytes
as they are on the wire when it splits."""

_NOT_SERVED: Mapping[str | None, str] = {
    "dmel": "audio (dmel)",
    None: "a chunk without content",
}


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


def parse_forward_backward(body: bytes) -> ForwardBackwardRequest:
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


def forward_backward_op(message: ForwardBackwardRequest) -> ForwardBackward:
    """Read all of the message.

    Raises:
        UserInputError: Data of a wrong size or shape, naming the datum; a loss_fn_config entry
            without a value.
        NotServedError: Audio or provenance spans.
    """
    _check_sparse_size(message)
    return ForwardBackward(
        model_id=message.model_id,
        data=[_datum(position, datum) for position, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=_config(message),
        forward_only=message.forward_only,
    )


def loss_reply(output: LossOutput) -> Reply:
    """Encode log-probabilities, (N,) or (N, K) each, and metrics as a ForwardBackwardOutput."""
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=array_records("logprobs", output.logprobs),
        metrics=dict(output.metrics),
    )
    return Reply(message.SerializeToString(), PROTO)


def _config(message: ForwardBackwardRequest) -> Mapping[str, float | str]:
    """The SDK sends numbers in both maps and text in the second alone, which therefore wins."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") is None:
            raise UserInputError(f"loss_fn_config[{key!r}] holds no value.", "Give it a number.")
        config[key] = value.text if value.HasField("text") else value.number
    return config


def _check_sparse_size(message: ForwardBackwardRequest) -> None:
    """Bound what a request unpacks to, before any of it is."""
    size = sum(
        max(0, math.prod(value.shape))
        for datum in message.data
        for value in datum.loss_fn_inputs.values()
        if value.HasField("sparse_csr")
    )
    if size > MAX_SPARSE_VALUES:
        raise UserInputError(
            f"The sparse loss_fn_inputs stand for {size:,} values; {MAX_SPARSE_VALUES:,} are the "
            "limit of a request.",
            "Send fewer datums at once, or fewer targets a position.",
        )


def _datum(position: int, datum: pb.Datum) -> TrainingDatum:
    place = f"data[{position}]"
    if datum.model_input_spans or datum.loss_fn_input_spans:
        raise NotServedError(
            f"{place} carries provenance spans; tinker-local keeps no record of the samples that "
            "they point to, and none of its losses reads them.",
            "Send the datum without them.",
        )
    inputs = {
        name: tensor(value, f"{place}.loss_fn_inputs[{name!r}]")
        for name, value in datum.loss_fn_inputs.items()
    }
    tokens, images = joined([_part(place, chunk) for chunk in datum.model_input])
    return TrainingDatum(tokens, inputs, images)


def _part(place: str, chunk: pb.Chunk) -> Part:
    if chunk.HasField("encoded_text"):
        return array(chunk.encoded_text.tokens, np.dtype(np.int32), place)
    if chunk.HasField("image"):
        image = chunk.image
        expected = image.expected_tokens if image.HasField("expected_tokens") else None
        return Image(0, image.data, image.format, expected)
    raise NotServedError(
        f"{place} holds {_NOT_SERVED[chunk.WhichOneof('chunk')]}; tinker-local's models read text "
        "only, some of them images, and have no encoder for anything else.",
        "Send encoded text.",
    )
