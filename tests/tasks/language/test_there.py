"""On a pretend device: tokens stay on the host, and the rows of a mini-batch are brought there."""

from __future__ import annotations

from pathlib import Path

import torch

from metadist import Compute, task_hypergradients
from metadist.algorithms import F2SA
from metadist.models import ModelFactory
from metadist.task import to_device
from metadist.tasks import LanguageModelProblem, SourceWeights
from tests.pretend_device import DEVICE, here, pretending, there
from tests.problems import assert_close
from tests.tasks.language.helpers import token_sources

BYTES = ModelFactory("tests.tasks.language.helpers.bigram", {"vocabulary": 256})


def test_rows_of_a_mini_batch_are_brought_to_the_device(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    problem = LanguageModelProblem(BYTES, SourceWeights(data.sources))
    outer = {"logits": torch.tensor([0.2, -0.1])}
    algorithm, compute = F2SA(inner_steps=1, inner_lr=0.1), Compute(batch_size=4)
    expected = task_hypergradients(
        problem, algorithm, outer, [data.sample(0)], compute=compute, states={}, is_checked=True
    )
    with pretending():
        task = to_device(data.sample(0), DEVICE)
        found = task_hypergradients(
            problem, algorithm, there(outer), [task], compute=compute, states={}, is_checked=True
        )
        total = here(found.total)
    assert_close(total, expected.total, 1e-6)
