"""A language model on a worker, which builds it from text."""

from __future__ import annotations

from pathlib import Path

import pytest

from metadist.cluster import RayExecutor, Workers
from tests.tasks.language.helpers import token_sources
from tests.tasks.language.test_runs import bytes_of, trainer


@pytest.mark.usefixtures("free_cluster")
def test_a_worker_gives_the_bytes_of_this_process_also_resumed(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    local = trainer(data, tmp_path / "local", tasks_per_lease=1)
    local.fit(4)
    for num_steps in (2, 4):
        executor = RayExecutor(Workers(num_workers=1, start_timeout_s=600.0))
        there = trainer(data, tmp_path / "ray", tasks_per_lease=1, executor=executor)
        if num_steps == 4:
            there.restore()
        there.fit(num_steps)
    assert bytes_of(there) == bytes_of(local)
