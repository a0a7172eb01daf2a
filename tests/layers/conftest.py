"""Layers here are small, and compute their derivatives themselves all the same."""

from __future__ import annotations

import pytest

from metadist import models
from metadist.layers import convolution, pooling


@pytest.fixture(autouse=True)
def no_input_is_small(monkeypatch):
    for module in (convolution, models, pooling):
        monkeypatch.setattr(module, "SMALL", 0)
