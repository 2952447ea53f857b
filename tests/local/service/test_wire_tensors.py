"""Tensors and settings of a forward_backward as they come off the wire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.response_conv import deserialize_forward_backward_output

from tinker_local.errors import UserInputError
from tinker_local.ops import LossOutput
from tinker_local.service import wire
from tinker_local.service.wire.arrays import tensor


def _csr(
    values: Sequence[float],
    row_starts: Sequence[int],
    columns: Sequence[int],
    shape: Sequence[int] = (2, 3),
) -> pb.Tensor:
    message = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape)
    message.sparse_csr.values = np.array(values, np.float32).tobytes()
    message.sparse_csr.crow_indices = np.array(row_starts, np.int64).tobytes()
    message.sparse_csr.col_indices = np.array(columns, np.int64).tobytes()
    return message


def test_a_sparse_tensor_is_zero_wherever_it_names_no_value() -> None:
    dense = tensor(_csr([5, 6, 7], [0, 1, 3], [2, 0, 1]), "here")

    assert dense.tolist() == [[0, 0, 5], [6, 7, 0]]


def test_a_sparse_tensor_without_values_is_zero() -> None:
    assert tensor(_csr([], [0, 0, 0], []), "here").tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (_csr([1, 2], [0, 2, 2], [1, 1]), "names a column twice"),
        (_csr([1, 2], [0, 2, 2], [2, 1]), "out of order"),
        (_csr([1, 2], [0, 2], [0, 1]), "do not divide 2 values among 2 rows"),
        (_csr([1, 2], [1, 1, 2], [0, 1]), "do not divide"),
        (_csr([1, 2], [0, 1, 1], [0, 1]), "do not divide"),
        (_csr([1, 2], [0, 3, 2], [0, 1]), "do not divide"),
        (_csr([1], [0, 2**63 - 1, -2, 1], [0], (3, 3)), "do not divide"),
        (_csr([1, 2], [0, 1, 2], [0]), "has 1 col_indices for 2 values"),
        (_csr([1, 2], [0, 1, 2], [0, 3]), "col_index 3; its columns are 0 to 2"),
        (_csr([1, 2], [0, 1, 2], [-1, 0]), "col_index -1"),
        (_csr([1], [0, 1], [0], (6,)), r"sparse with the shape \[6\]"),
        (_csr([1], [0, 1], [0], (-1, -1)), r"sparse with the shape \[-1, -1\]"),
        (_csr([1], [0, 1], [0], (1, 2**40)), "at most 16,777,216 values"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**32, 2**32], dense=b""), "has 0 values"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"12345"), "has 5 bytes"),
        (pb.Tensor(dense=b"1234"), "has dtype 0"),
    ],
)
def test_a_tensor_that_does_not_agree_with_itself_is_refused_by_name(
    message: pb.Tensor, said: str
) -> None:
    with pytest.raises(UserInputError, match=rf"^here.*{said}"):
        tensor(message, "here")


def test_bfloat16_and_int32_are_widened() -> None:
    halves = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    floats = tensor(pb.Tensor(dtype=pb.DTYPE_BFLOAT16, dense=halves.tobytes()), "here")
    ints = tensor(
        pb.Tensor(dtype=pb.DTYPE_INT32, dense=np.array([3, -4], np.int32).tobytes()), "here"
    )

    assert (floats.dtype, floats.tolist()) == (np.float32, [1.5, -2.0])
    assert (ints.dtype, ints.tolist()) == (np.int64, [3, -4])


def test_sparse_tensors_that_unpack_to_too_much_together_are_refused_at_once() -> None:
    message = pb.ForwardBackwardRequest()
    for _ in range(5):
        datum = message.data.add()
        datum.loss_fn_inputs["weights"].CopyFrom(_csr([1], [0, 1], [0], (1, 2**24)))

    with pytest.raises(UserInputError, match="stand for 83,886,080 values"):
        wire.forward_backward_op(message)


def test_a_config_entry_without_a_value_is_refused() -> None:
    message = pb.ForwardBackwardRequest()
    message.loss_fn_config_v2["beta"].SetInParent()

    with pytest.raises(UserInputError, match=r"loss_fn_config\['beta'\] holds no value"):
        wire.forward_backward_op(message)


def test_arrays_of_changing_shapes_are_read_back_by_the_sdk_in_their_order() -> None:
    shapes = [(2,), (3, 2), (1, 2), (2, 4), (2, 2), (4,)]
    arrays = [np.full(shape, position, dtype=np.float32) for position, shape in enumerate(shapes)]

    reply = wire.loss_reply(LossOutput(arrays, {"loss:sum": 1.5}))

    output = deserialize_forward_backward_output(reply.body)
    for datum, sent in zip(output.loss_fn_outputs, arrays, strict=True):
        np.testing.assert_array_equal(datum["logprobs"].to_numpy(), sent)
    assert output.metrics == {"loss:sum": 1.5}
