"""Tensors of the protocol <-> numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import NotServedError, UserInputError

_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype(np.float32),
    pb.DTYPE_INT64: np.dtype(np.int64),
    pb.DTYPE_INT32: np.dtype(np.int32),
}


def tensor(tensor: pb.Tensor, place: str) -> NDArray[np.generic]:
    """int64 or float32, in the shape that came with it."""
    if tensor.dtype not in _DTYPES:
        raise UserInputError(f"{place} has dtype {tensor.dtype}.", "Send float32 or int64.")
    if tensor.HasField("sparse_csr"):
        raise NotServedError(f"{place} is sparse.", "Send one target a position, shape (N,).")
    values = array(tensor.dense, _DTYPES[tensor.dtype], place)
    if tensor.dtype == pb.DTYPE_INT32:
        values = values.astype(np.int64)
    shape = tuple(tensor.shape) or values.shape
    if int(np.prod(shape)) != values.size:
        raise UserInputError(
            f"{place} has {values.size} values for the shape {list(shape)}.", "Make them agree."
        )
    return values.reshape(shape)


def array(data: bytes, dtype: np.dtype[Any], place: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise UserInputError(
            f"{place} has {len(data)} bytes, no whole number of {dtype}.", "Use the tinker SDK."
        )
    return np.frombuffer(data, dtype=dtype).copy()  # frombuffer alone is read-only
