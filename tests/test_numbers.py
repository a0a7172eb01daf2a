"""A boolean is no number: every public class says which of its options must be one."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator

import pytest
import torch

from metadist import Adam, OuterOptimizer, adapt, check_hypergradient, evaluate
from metadist.algorithms import ITD
from metadist.models import MLP, ResNet12
from metadist.tasks import FewShotProblem, Genotype, Sinusoid, SourceWeights, SparseRegressionData

PACKAGES = (
    *("metadist", "metadist.algorithms", "metadist.cluster", "metadist.models"),
    *("metadist.step_rules", "metadist.tasks"),
)
OURS = (
    "AutogradOracle",  # made for each lease, with numbers that a graph follows
    # Records of what was found:
    *("Checkpoint", "EvaluationResult", "HypergradientReport", "HypergradientSum", "Interval"),
    *("Random", "SamplerReport", "TrainingResult"),
)

PROBLEM = FewShotProblem(MLP(), loss="mse")
X = PROBLEM.init_outer(torch.Generator())

REQUIRED = {
    "algorithm": ITD(),
    "genotype": Genotype.random(0),
    "model": MLP(),
    "problem": PROBLEM,
    "sampler": Sinusoid(),
    "sources": ["news", "web"],
    "weights": SourceWeights(["news", "web"]),
    "build": "package.module.function",
    "num_features": 2,
    "vocabulary": 2,
    "num_classes": 2,
    **dict.fromkeys(["classes", "dataset", "draws", "folder", "root", "splits", "stages"]),
    "size": 2,
}
"""What has no default, by name; None for data that is not looked at before the numbers."""


def classes() -> Iterator[type]:
    """All public classes that somebody else makes."""
    found = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            made = getattr(module, name)
            if not inspect.isclass(made) or issubclass(made, Exception) or name in OURS:
                continue
            if not inspect.isabstract(made) and made not in found:
                found.add(made)
                yield made


def numbers_of(made: type) -> list[str]:
    """The options of a class that are numbers."""
    found = []
    for name, parameter in inspect.signature(made).parameters.items():
        hint = inspect.formatannotation(parameter.annotation).strip("'")
        if re.fullmatch(r"(int|float|None| \| )+", hint):
            found.append(name)
    return found


@pytest.mark.parametrize("made", list(classes()))
def test_a_boolean_is_no_number(made):
    parameters = inspect.signature(made).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    for option in numbers_of(made):
        arguments = {name: REQUIRED.get(name) for name in needed}
        for value in (True, False):
            with pytest.raises(ValueError, match=rf"{option}\b.* must .*got {value}"):
                made(**{**arguments, option: value})


def test_numbers_are_found():
    assert numbers_of(ITD)[:2] == ["inner_steps", "inner_lr"]
    assert sum(bool(numbers_of(made)) for made in classes()) > 100


TUPLES = {
    "betas": lambda value: Adam(betas=(0.9, value)),
    "hidden": lambda value: MLP(hidden=(value,)),
    "widths": lambda value: ResNet12(widths=(4, 4, 4, value)),
    "amplitude": lambda value: Sinusoid(amplitude=(value, 2.0)),
    "coefficients": lambda value: SparseRegressionData(coefficients=(1.0, value)),
    "schedule_factors": lambda value: OuterOptimizer(schedule_factors={1: value}),
    "repeats": lambda value: check_hypergradient(PROBLEM, Sinusoid(), ITD(), repeats=(value,)),
    "num_tasks": lambda value: evaluate(PROBLEM, Sinusoid(), ITD(), {}, value),
    "inner_steps": lambda value: adapt(PROBLEM, ITD(), X, Sinusoid().sample(0), inner_steps=value),
}


@pytest.mark.parametrize("option", TUPLES)
def test_nor_within_a_tuple_or_to_a_function(option):
    for value in (True, False):
        with pytest.raises(ValueError, match=rf"{option}.* must "):
            TUPLES[option](value)
