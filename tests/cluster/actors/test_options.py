"""Options that do not go together; tests/checks/test_values.py reads the rules of single ones."""

from __future__ import annotations

import pytest

from metadist.cluster import Workers
from metadist.cluster.actors.placement import Placement


def test_no_more_workers_are_waited_for_than_there_are():
    with pytest.raises(ValueError, match=r"min_workers must be <= num_workers=2, .* got 3"):
        Workers(num_workers=2, min_workers=3)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "device must be 'auto', 'cpu' or 'cuda' .* got 'cuda:1'"),
        ("cuda", "gpus_per_worker must be > 0 or None with device='cuda', got 0"),
    ],
)
def test_a_device_that_ray_cannot_reserve_is_refused(device, message):
    with pytest.raises(ValueError, match=message):
        Placement(Workers(gpus_per_worker=0), None, None).open(device)
