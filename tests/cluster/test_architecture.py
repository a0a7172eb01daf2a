"""A search on a Ray worker gives the bytes of one process."""

import pytest

from metadist import LocalExecutor, Trainer
from metadist.algorithms import DARTS
from metadist.cluster import RayExecutor, Workers
from metadist.tasks import ArchitectureSearch, ImageData, Supernet
from tests.problems import assert_same_bytes


@pytest.mark.usefixtures("free_cluster")
def test_a_search_on_a_worker(tmp_path):
    data = ImageData("digits", num_train=60, num_val=50, num_test=40)
    executor = RayExecutor(Workers(num_workers=1, start_timeout_s=600.0))
    found = []
    for name, where in (("local", LocalExecutor()), ("ray", executor)):
        problem = ArchitectureSearch(Supernet(channels=2, cells="NR", nodes=1))
        method = DARTS(inner_steps=1, inner_lr=0.05)
        trainer = Trainer(
            problem,
            data,
            method,
            batch_size=16,
            quiet=True,
            executor=where,
            run_dir=str(tmp_path / name),
        )
        trainer.fit(3)
        found.append(trainer)
    local, on_ray = found
    assert_same_bytes(on_ray.outer, local.outer)
    assert_same_bytes(on_ray.inner(0), local.inner(0))
    shown = [
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("artifacts/*/*.json")}
        for name in ("local", "ray")
    ]
    assert "genotype.json" in shown[0] and shown[0] == shown[1]
