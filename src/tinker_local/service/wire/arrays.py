"""Tensors of the protocol <-> numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinker.proto import tinker_public_pb2 as pb

from tinker_local.errors import UserInputError
from tinker_local.ops import Floats

MAX_TENSOR_VALUES = 2**24
"""Of a sparse tensor in dense form, 128 MiB of int64: a few bytes may claim any shape."""

_DTYPES: Mapping[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype(np.float32),
    pb.DTYPE_INT64: np.dtype(np.int64),
    pb.DTYPE_INT32: np.dtype(np.int32),
    pb.DTYPE_BFLOAT16: np.dtype(np.uint16),  # numpy has none: the upper half of a float32
}
_INT64 = np.dtype(np.int64)


def tensor(message: pb.Tensor, place: str) -> NDArray[np.generic]:
    """int64 or float32, dense, in the shape that came with it; without one, (N,).

    int32 and bfloat16 are widened. Sparse CSR has 0 wherever it names no value.

    Args:
        message: A tensor of the protocol.
        place: How an error names it.

    Raises:
        UserInputError: Bytes, shape and indices that do not agree, or a sparse tensor of over
            MAX_TENSOR_VALUES.
    """
    if message.dtype not in _DTYPES:
        raise UserInputError(f"{place} has dtype {message.dtype}.", "Send float32 or int64.")
    if message.HasField("sparse_csr"):
        return _dense_of_csr(message, place)
    values = _values(message.dense, message.dtype, place)
    shape = tuple(message.shape) or values.shape
    if min(shape, default=0) < 0 or math.prod(shape) != values.size:
        raise UserInputError(
            f"{place} has {values.size} values for the shape {list(shape)}.", "Make them agree."
        )
    return values.reshape(shape)


def array(data: bytes, dtype: np.dtype[Any], place: str) -> NDArray[Any]:
    """The numbers in `data`, (N,).

    Raises:
        UserInputError: Not a whole number of them.
    """
    if len(data) % dtype.itemsize:
        raise UserInputError(
            f"{place} has {len(data)} bytes, no whole number of {dtype}.", "Use the tinker SDK."
        )
    return np.frombuffer(data, dtype=dtype).copy()  # frombuffer alone is read-only


def array_records(name: str, arrays: Sequence[Floats]) -> list[pb.ArrayRecord]:
    """One field of all datums as records whose arrays share a trailing shape.

    The SDK reads the records one after the other, so neighbours alone can share one: the datums'
    order is that of the records (SDK 0.38, `proto/response_conv.py`).
    """
    return [
        _array_record(name, list(neighbours), trailing_shape)
        for trailing_shape, neighbours in groupby(arrays, key=lambda array: array.shape[1:])
    ]


def _array_record(
    name: str, arrays: Sequence[Floats], trailing_shape: tuple[int, ...]
) -> pb.ArrayRecord:
    record = pb.ArrayRecord(type_tag="ArrayRecord", num_datums=len(arrays))
    field = record.fields[name]
    field.data = b"".join(array.tobytes() for array in arrays)
    field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
    field.dtype = pb.DTYPE_FLOAT32
    field.trailing_shape.extend(trailing_shape)
    return record


def _values(data: bytes, dtype: int, place: str) -> NDArray[np.generic]:
    values = array(data, _DTYPES[dtype], place)
    if dtype == pb.DTYPE_BFLOAT16:
        widened: NDArray[np.float32] = (values.astype(np.uint32) << 16).view(np.float32)
        return widened
    return values.astype(np.int64) if dtype == pb.DTYPE_INT32 else values


def _dense_of_csr(message: pb.Tensor, place: str) -> NDArray[np.generic]:
    values = _values(message.sparse_csr.values, message.dtype, place)
    row_starts = array(message.sparse_csr.crow_indices, _INT64, f"{place}.crow_indices")
    columns = array(message.sparse_csr.col_indices, _INT64, f"{place}.col_indices")
    rows, width = _csr_shape(tuple(message.shape), place)
    _check_rows(row_starts, rows, values.size, place)
    _check_columns(columns, width, values.size, place)
    places = np.repeat(np.arange(rows) * width, np.diff(row_starts)) + columns
    if (np.diff(places) <= 0).any():
        # torch asks for the same. The sum of two values under one index would be a third token.
        raise UserInputError(
            f"{place} names a column twice, or out of order, in one row.",
            "Sort col_indices within each row and name each once.",
        )
    dense = np.zeros(rows * width, dtype=values.dtype)
    dense[places] = values
    return dense.reshape(rows, width)


def _csr_shape(shape: tuple[int, ...], place: str) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 0 or math.prod(shape) > MAX_TENSOR_VALUES:
        raise UserInputError(
            f"{place} is sparse with the shape {list(shape)}.",
            f"Send two dimensions of at most {MAX_TENSOR_VALUES:,} values together.",
        )
    return shape[0], shape[1]


def _check_rows(row_starts: NDArray[np.int64], rows: int, values: int, place: str) -> None:
    is_whole = row_starts.size == rows + 1 and row_starts[0] == 0 and row_starts[-1] == values
    is_within = ((row_starts >= 0) & (row_starts <= values)).all()  # or a difference overflows
    if not is_whole or not is_within or (np.diff(row_starts) < 0).any():
        raise UserInputError(
            f"{place} has crow_indices that do not divide {values} values among {rows} rows.",
            f"Send {rows + 1} of them, rising from 0 to {values}.",
        )


def _check_columns(columns: NDArray[np.int64], width: int, values: int, place: str) -> None:
    if columns.size != values:
        raise UserInputError(
            f"{place} has {columns.size} col_indices for {values} values.", "Make them agree."
        )
    outside = columns[(columns < 0) | (columns >= width)]
    if outside.size:
        raise UserInputError(
            f"{place} has the col_index {outside[0]}; its columns are 0 to {width - 1}.",
            "Make shape and col_indices agree.",
        )
