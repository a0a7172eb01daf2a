"""The options of workers and server, and devices that go with them: every message."""

from __future__ import annotations

import pytest

from metadist.cluster import Server, Workers
from metadist.cluster.actors.placement import Placement


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be > 0, got 0"),
        ({"gpus_per_worker": -1.0}, "gpus_per_worker must be >= 0 or None, got -1.0"),
        ({"start_timeout_s": 0}, "start_timeout_s must be > 0, got 0"),
        ({"num_workers": 2, "min_workers": 3}, "min_workers must be .* <= num_workers=2.* got 3"),
        ({"min_workers": 0}, "min_workers must be >= 1 .* got 0"),
    ],
)
def test_impossible_workers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Workers(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_shards": 0}, "num_shards must be >= 1, got 0"),
        ({"snapshot_every": 0}, "snapshot_every must be >= 1, got 0"),
        ({"gpus_per_server": -1.0}, "gpus_per_server must be >= 0, got -1"),
        ({"timeout_s": 0.0}, "timeout_s of the server must be > 0 or None .*, got 0"),
    ],
)
def test_an_impossible_server_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Server(**options)


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
