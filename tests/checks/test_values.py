"""Declared rules: every one refuses what is just outside it, and says field, rule and value."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from typing import Any

import numpy as np
import pytest

import metadist
from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD
from metadist.checks.values import Rule, check, check_fields, require_bool, rule
from metadist.compute import Compute
from metadist.workload import Workload
from tests.problems import Quadratic, QuadraticSampler

NEEDED: dict[type, dict[str, Any]] = {
    Workload: {"problem": Quadratic(2, 4), "sampler": QuadraticSampler(), "algorithm": ITD()}
}
"""The arguments without a default, by class."""


def classes_with_rules() -> list[type]:
    """All classes of the project with a field that has a rule, but for abstract ones."""
    found = {}
    for module in pkgutil.walk_packages(metadist.__path__, "metadist."):
        if module.name == "metadist.__main__":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if not isinstance(value, type) or inspect.isabstract(value):
                continue
            fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            if any("rule" in field.metadata for field in fields):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [found[name] for name in sorted(found)]


def outside(limits: Rule) -> list[tuple[Any, str]]:
    """Values just outside, each with what the message must say."""
    found: list[tuple[Any, str]] = []
    if limits.none is None:
        found.append((None, "None"))
    if limits.one_of is not None:
        return [*found, ("another", ", ".join(map(repr, limits.one_of)))]
    if limits.ge is not None:
        found.append((limits.ge - 1, f"{limits.ge}"))
    if limits.gt is not None:
        found.append((limits.gt, f"{limits.gt}"))
    if limits.le is not None:
        found.append((limits.le + 1, f"{limits.le}]"))
    if limits.lt is not None:
        found.append((limits.lt, f"{limits.lt})"))
    return [*found, (math.nan, "nan"), (math.inf, "inf")]


CASES = [
    pytest.param(each, field.name, value, words, id=f"{each.__name__}.{field.name}={value}")
    for each in classes_with_rules()
    for field in dataclasses.fields(each)
    if "rule" in field.metadata
    for value, words in outside(field.metadata["rule"])
]


@pytest.mark.parametrize(("owner", "field", "value", "words"), CASES)
def test_every_declared_rule_refuses_what_is_outside(owner, field, value, words):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got {value!r}$") as caught:
        owner(**{**NEEDED.get(owner, {}), field: value})
    assert words in str(caught.value)


@pytest.mark.parametrize("owner", classes_with_rules(), ids=lambda owner: owner.__name__)
def test_a_field_that_is_declared_again_keeps_its_rule(owner):
    for base in inspect.getmro(owner)[1:]:
        if not dataclasses.is_dataclass(base):
            continue
        ruled = {each.name for each in dataclasses.fields(base) if "rule" in each.metadata}
        ours = {each.name for each in dataclasses.fields(owner) if "rule" in each.metadata}
        assert ruled <= ours, f"{owner.__name__} drops a rule of {base}"


@dataclasses.dataclass
class Example:
    """One of each kind."""

    steps: int = rule(2, ge=1)
    rate: float = rule(0.5, gt=0)
    share: float = rule(0.5, ge=0, lt=1)
    limit: float | None = rule(None, gt=0, none="for no limit")
    size: int | None = rule(None, ge=1, none="")
    way: str = rule("a", one_of=("a", "b"))
    keep: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"steps": 1.5}, "steps must be an integer >= 1, got 1.5"),
        ({"steps": "many"}, "steps must be an integer >= 1, got 'many'"),
        ({"rate": 0.0}, "rate must be > 0 and finite, got 0.0"),
        ({"rate": math.inf}, "rate must be > 0 and finite, got inf"),
        ({"share": 1}, "share must be in [0, 1), got 1"),
        ({"share": math.nan}, "share must be in [0, 1), got nan"),
        ({"limit": -1.0}, "limit must be > 0 and finite or None for no limit, got -1.0"),
        ({"size": 0}, "size must be >= 1 or None, got 0"),
        ({"rate": True}, "rate must be a number > 0, got True"),
        ({"steps": True}, "steps must be an integer >= 1, got True"),
        ({"keep": "yes"}, "keep must be True or False, got 'yes'"),
        ({"keep": 1}, "keep must be True or False, got 1"),
        ({"way": "c"}, "way must be one of ('a', 'b'), got 'c'"),
    ],
)
def test_messages(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Example(**values)


def test_what_is_just_inside_is_accepted():
    Example(steps=1, rate=1e-300, share=0, limit=None, size=None, way="b")
    check("value", 1, ge=1, le=1)
    with pytest.raises(ValueError, match=r"^value must be in \[1, 2\], got 3$"):
        check("value", 3, ge=1, le=2)


def numpy_of(value: Any) -> Any:
    kinds: dict[type, type] = {bool: np.bool_, int: np.int64, float: np.float64}
    kind = kinds.get(type(value))
    return value if kind is None else kind(value)


@pytest.mark.parametrize("owner", classes_with_rules(), ids=lambda owner: owner.__name__)
def test_scalars_of_numpy_are_those_of_python(owner):
    like = owner(**NEEDED.get(owner, {}))
    values = {f.name: getattr(like, f.name) for f in dataclasses.fields(owner) if f.init}
    made = owner(**{name: numpy_of(value) for name, value in values.items()})
    assert made == like and repr(made) == repr(like)
    for name in values:
        assert type(getattr(made, name)) is type(getattr(like, name))


def test_a_checked_value_is_a_scalar_of_python():
    assert type(check("size", np.uint8(3), ge=1, is_integer=True)) is int
    assert type(check("rate", np.float32(0.5), gt=0)) is float
    with pytest.raises(ValueError, match=r"^size must be an integer >= 1, got 2\.5$"):
        check("size", np.float64(2.5), ge=1, is_integer=True)


def test_a_run_is_trained_and_resumed_with_scalars_of_numpy(tmp_path):
    def trainer(one: Any, rate: Any) -> Trainer:
        return Trainer(
            Quadratic(2, 4),
            QuadraticSampler(),
            ITD(inner_steps=2 * one, inner_lr=rate),
            outer_optimizer=OuterOptimizer("sgd", lr=rate, options={"momentum": rate}),
            meta_batch_size=4 * one,
            seed=3 * one,
            checkpoint_every=2 * one,
            run_dir=tmp_path / "run",
            quiet=True,
        )

    first = trainer(np.int64(1), np.float64(0.25))
    first.fit(np.int32(2))  # type: ignore[arg-type]
    again = trainer(1, 0.25)
    again.restore()
    again.fit(4)
    assert again.version == 4


def test_a_text_is_no_boolean():
    require_bool(one=True, two=np.bool_(False))
    with pytest.raises(ValueError, match=r"^two must be True or False, got 'false'$"):
        require_bool(one=True, two="false")


@pytest.mark.parametrize("seed", [True, 1.5, -1, 2**64])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match=r"^seed must be an integer"):
        Compute(seed=seed)
