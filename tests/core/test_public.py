"""The public names of metadist: imported when they are used, and as good as before."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

import metadist

NAMES = """
Algorithm AutogradOracle Batch Checkpoint CheckpointError CheckpointStore CountingOracle Estimate
EvaluationResult Executor HypergradientReport HypergradientSum InnerState Interval LocalExecutor
Oracle OuterOptimizer Params Problem StepReport Task TaskSampler Trainer TrainingDiverged
TrainingResult check_hypergradient evaluate task_hypergradients
"""


def test_the_names_are_these():
    assert set(NAMES.split()) <= set(metadist.__all__) <= set(dir(metadist))
    assert len(set(metadist.__all__)) == len(metadist.__all__)


@pytest.mark.parametrize("name", metadist.__all__)
def test_a_name_is_there_and_travels_by_reference(name):
    found = getattr(metadist, name)
    if isinstance(found, type):
        assert pickle.loads(pickle.dumps(found)) is found
    scope: dict[str, object] = {}
    exec(f"from metadist import {name}", scope)
    assert scope[name] is found


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="module 'metadist' has no attribute 'Trainr'"):
        _ = getattr(metadist, "Trainr")  # noqa: B009
    with pytest.raises(ImportError, match="cannot import name 'Trainr'"):
        exec("from metadist import Trainr")


def test_importing_the_package_imports_no_torch_until_a_name_is_used():
    code = (
        "import sys, metadist; assert 'torch' not in sys.modules; from metadist import *; "
        "assert 'torch' in sys.modules and Trainer is metadist.Trainer"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
