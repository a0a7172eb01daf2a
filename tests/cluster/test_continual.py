"""A stream with what the problem carries, on Ray: the bytes of one process."""

from __future__ import annotations

import torch

from metadist.algorithms import ITD
from metadist.cluster import Workers
from metadist.optimizer import OuterOptimizer
from metadist.tasks import ContextualNetwork, ContinualLearning, PermutedImages
from metadist.workload import Workload
from tests.cluster.toy import first_state, local_run, state_bytes


def test_a_stream_and_what_is_carried_have_the_bytes_of_one_process(executor):
    stream = PermutedImages(
        "digits", num_tasks=2, per_task=20, num_test=10, batch=5, memory=12, semantic=4
    )
    torch.manual_seed(0)
    network = ContextualNetwork(64, width=8, num_tasks=2, embedding=4)
    problem = ContinualLearning(network, distillation=1.0, num_slots=stream.num_slots)
    method = ITD(inner_steps=1, inner_lr=0.1, first_order=True)
    workload = Workload(problem, stream, method, meta_batch_size=1, keep_state=True)
    sgd = OuterOptimizer("sgd", lr=0.1)
    expected, _ = local_run(stream.num_steps, workload, sgd)
    state = first_state(problem, sgd)
    running = executor(workload, state, sgd, workers=Workers(num_workers=1))
    list(running.run(stream.num_steps))
    assert state_bytes(running.state()) == state_bytes(expected)
    targets = expected.states[0][-10 * (stream.num_slots + 1) :]
    assert targets.reshape(-1, 10)[1:].any(1).all()
