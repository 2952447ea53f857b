"""Bytes <-> ops: the only room that touches protobuf.

The messages are the SDK's own (`tinker.proto`), as are the JSON requests (`tinker.types`), so
both ends agree by construction on SDK 0.38.
"""

from tinker_local.service.wire.replies import failure_body, json_reply
from tinker_local.service.wire.sampling import sample_op, sample_reply
from tinker_local.service.wire.training import (
    MAX_BODY_BYTES,
    ForwardBackwardRequest,
    decompress,
    forward_backward_op,
    loss_reply,
    parse_forward_backward,
)

__all__ = [
    "MAX_BODY_BYTES",
    "ForwardBackwardRequest",
    "decompress",
    "failure_body",
    "forward_backward_op",
    "json_reply",
    "loss_reply",
    "parse_forward_backward",
    "sample_op",
    "sample_reply",
]
