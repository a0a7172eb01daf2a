"""Sparse rows that slice like dense ones: each row as its columns and values, padded with zeros.

A `Batch` of such rows is two tensors whose leading axis is the example, so mini-batches and shards
are cut from it as from any other.

Shape letters: n rows, m largest number of values of a row, D columns, C columns of the product.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

KEPT = 4
"""The number of matrices kept in compressed form: full batches come again at every step."""


def sparse_matmul(columns: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """The product (n, C) of sparse rows and a dense matrix; differentiable any number of times.

    Only `dense` has derivatives; in eager torch.autograd and under torch.func.grad and
    torch.func.vmap over `dense`.

    Args:
        columns: Integers >= 0, (n, m); padded entries are arbitrary.
        values: (n, m), 0 where a row is padded; they must not be changed in place.
        dense: (D, C), D > every column.

    Raises:
        ValueError: a column beyond D.

    Cost: one compressed sparse product per pass, 2 C operations per value that is not 0.
    """
    return _Product.apply(columns, values, dense, None)


class _Matrix(NamedTuple):
    """A matrix and its transpose, both by compressed rows (torch's own transpose is slow)."""

    rows: Tensor
    transposed: Tensor


class _Product(Function):
    """X W, or with `num_columns` X' W; each is the derivative of the other."""

    @staticmethod
    def forward(columns: Tensor, values: Tensor, dense: Tensor, num_columns: int | None) -> Tensor:
        """`num_columns`: D for the transposed product, whose result has D rows; else None."""
        if num_columns is None:
            return _compressed(columns, values, dense.shape[0]).rows @ dense
        return _compressed(columns, values, num_columns).transposed @ dense

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        columns, values, dense, num_columns = inputs
        ctx.save_for_backward(columns, values)
        ctx.num_columns = dense.shape[0] if num_columns is None else None

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, None]:
        columns, values = ctx.saved_tensors
        return None, None, _Product.apply(columns, values, gradient, ctx.num_columns), None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        columns: Tensor,
        values: Tensor,
        dense: Tensor,
        num_columns: int | None,
    ) -> tuple[Tensor, int]:
        if in_dims[:2] != (None, None):
            raise ValueError("sparse rows must be the same for all tasks: use vectorize=False")
        dense = dense.movedim(in_dims[2], 0)  # type: ignore[arg-type]
        size, _, width = dense.shape
        wide = dense.transpose(0, 1).reshape(-1, size * width)
        product = _Product.apply(columns, values, wide, num_columns)
        return product.view(-1, size, width).transpose(0, 1), 0


_kept: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, _Matrix]] = OrderedDict()
"""A cache for the process, of the last `KEPT` matrices; results do not depend on it."""


def _compressed(columns: Tensor, values: Tensor, num_columns: int) -> _Matrix:
    """The matrix of these rows, from the last few that were asked for, if it is among them."""
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        # It would go on with the matrix of these tasks, and after that has left the cache, too.
        raise RuntimeError("the rows of a sparse matrix are looked at while a graph is recorded")
    # The entry holds the tensors, so that their addresses are not given to others.
    places = columns.data_ptr(), values.data_ptr(), values.device
    key = (*places, values.dtype, values.shape, num_columns)
    if key not in _kept:
        _kept[key] = (columns, values, _compress(columns, values, num_columns))
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key][2]


def _compress(columns: Tensor, values: Tensor, num_columns: int) -> _Matrix:
    # By flat positions, which is faster than by masks: every mini-batch comes through here.
    place = values.flatten().nonzero()[:, 0]
    row, column = place // values.shape[1], columns.flatten()[place].long()
    value = values.flatten()[place]
    if len(column) and int(column.max()) >= num_columns:
        found = int(column.max())
        raise ValueError(
            f"columns must be < {num_columns}, the rows of the dense matrix, got {found}: a model "
            f"of these rows needs num_features >= {found + 1}"
        )
    by_column = column.argsort(stable=True)
    return _Matrix(
        _csr(row, column, value, (len(values), num_columns)),
        _csr(column[by_column], row[by_column], value[by_column], (num_columns, len(values))),
    )


def _csr(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix by compressed rows; `row` is sorted."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64, device=row.device)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, column, value, shape, check_invariants=False)
