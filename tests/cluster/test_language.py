"""Language models on workers, which build them from text."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import ray

from metadist.cluster import RayExecutor, Server, Workers
from metadist.task import Task
from metadist.tasks import TokenSources
from tests.cluster.toy import happens_first
from tests.tasks.language.helpers import gpt2, token_sources
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


class DeadlyOnce(TokenSources):
    """Kills the first worker that samples for the third time; checks are no actors."""

    num_samples = 0

    def sample(self, index: int) -> Task:
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            self.num_samples += 1
            if self.num_samples == 3 and happens_first(self.folder, "died"):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(index)


@pytest.mark.usefixtures("free_cluster")
def test_a_transformer_on_workers_has_the_same_bytes_also_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    data = token_sources(tmp_path)
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = gpt2(config={"vocab_size": 256}, lora=lora, rematerialise=True)
    local = trainer(data, tmp_path / "local", model=model, tasks_per_lease=1)
    local.fit(5)
    executor = RayExecutor(
        Workers(num_workers=2, start_timeout_s=600.0), Server(snapshot_every=2), state="worker"
    )
    deadly = DeadlyOnce(data.folder)
    there = trainer(deadly, tmp_path / "ray", model=model, tasks_per_lease=1, executor=executor)
    there.fit(5)
    assert bytes_of(there) == bytes_of(local)
    assert "worker_lost" in (tmp_path / "ray" / "events.jsonl").read_text()
