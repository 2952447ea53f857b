"""forward_backward: its request in protobuf, its result in protobuf."""

from __future__ import annotations

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError, UserInputError
from tinker_local.ops import ForwardBackward, LossOutput, Tokens, TrainingDatum
from tinker_local.service.futures import Reply
from tinker_local.service.wire.arrays import array
from tinker_local.service.wire.replies import PROTO

MAX_BODY_BYTES = 64 * 2**20
"""The SDK splits a forward_backward at 5 MB; anything near this limit is no SDK's."""


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
    return Reply(message.SerializeToString(), PROTO)


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
        chunks.append(array(chunk.encoded_text.tokens, np.dtype(np.int32), place))
    tokens: Tokens = np.concatenate([np.empty(0, np.int32), *chunks]).astype(np.int64)
    inputs = {
        name: tensor(tensor, f"{place}.loss_fn_inputs[{name!r}]")
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return TrainingDatum(tokens, inputs)
