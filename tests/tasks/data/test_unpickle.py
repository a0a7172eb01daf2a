"""Pickles of arrays are read, and nothing else is."""

import os
import pickle

import numpy as np
import pytest
import torch

from metadist.tasks.data.unpickle import read_arrays
from tests.tasks.helpers import refusal


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_unpickler_builds_arrays_and_nothing_else(protocol):
    matrix, vector = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2])
    arrays = [(matrix, vector), 3.0]
    (got_matrix, got_vector), number = read_arrays(pickle.dumps(arrays, protocol))
    assert np.array_equal(got_matrix, matrix) and got_matrix.dtype == np.float32
    assert np.array_equal(got_vector, vector) and number == 3.0
    message = refusal(lambda: read_arrays(pickle.dumps(Evil(), protocol)), pickle.UnpicklingError)
    assert "it asks for posix.system, which a data file must not" in message
    with pytest.raises(pickle.UnpicklingError):
        read_arrays(pickle.dumps(torch.zeros(1), protocol))


def test_an_old_pickle_of_arrays_is_read():
    """NumPy 1 under Python 2 called its module numpy.core."""
    old = pickle.dumps(np.eye(2), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in old
    assert np.array_equal(read_arrays(old), np.eye(2))
