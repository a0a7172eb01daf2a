"""The config of a run that was made in Python, for the command line to go on with it.

Objects are written as the class paths and arguments that they were made from, as far as they keep
these in attributes of the same names. What cannot be written is named in the file, and so is a
fingerprint of the losses and of task 0, by which a rebuilt run is compared with the one that was.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from metadist.checks.values import plain
from metadist.draws import first_parts
from metadist.problem import Problem
from metadist.sampler import TaskSampler, sample_task
from metadist.task import Task, stays_on_host, to_device
from metadist.trees import Params

HEADER = (
    "# Of a run that was made in Python: metadist resume, evaluate, predict and export read it."
)
UNKNOWN = "# unknown: "
WITHOUT = "# not called by commands: "
FINGERPRINT = "# fingerprint: "
WAY_OUT = (
    "write these options into that file by hand and remove its lines that begin with "
    f"{UNKNOWN.strip()!r}, or go on in Python (Trainer.restore)"
)
TOLERANCE = 1e-3
MANY = 1 << 26
"""The most numbers of a tensor in a fingerprint."""
FEW = 16
"""The most examples in the losses of a fingerprint, where data stays in files."""


def config_of(settings: Mapping[str, Any], sampler: TaskSampler | None) -> str:
    """The text of a config: `settings` by option, and a fingerprint of problem and sampler.

    None for the sampler: no fingerprint, where a part of its data alone is at hand.
    """
    unknown: list[str] = []
    tree = {}
    found = None
    # Whatever users' classes raise here, the run they are trained by is none the worse.
    watching: list[str] = []
    for name, value in settings.items():
        # Without a callback a run is the same, so that one from __main__ stops nobody.
        reasons = watching if name == "callbacks" else unknown
        try:
            tree[name] = _spelled(value, name, reasons)
        except Exception as error:  # noqa: BLE001
            unknown.append(f"{name}, whose arguments end in {_in_a_line(error)}")
    try:
        if sampler is not None:
            found = fingerprint(settings["problem"], sampler)
    except Exception as error:  # noqa: BLE001
        unknown.append(f"problem, whose losses at another x end in {_in_a_line(error)}")
    if watching:
        tree["callbacks"] = []
    lines = [HEADER, *(WITHOUT + reason for reason in watching)]
    lines += [UNKNOWN + reason for reason in unknown]
    if found is not None:
        lines.append(FINGERPRINT + json.dumps(found))
    return "\n".join([*lines, json.dumps(tree, indent=1), ""])


def require_known(text: str, where: str) -> None:
    """Raise ValueError if a config says that something of it is not known."""
    unknown = _lines(text, UNKNOWN)
    if unknown:
        raise ValueError(
            f"the run in {where} must be one that text can describe, got one made in Python with "
            f"{'; '.join(unknown)}: {WAY_OUT}"
        )


def require_same(
    text: str, problem: Problem, sampler: Callable[[], TaskSampler], where: str
) -> None:
    """Raise ValueError unless rebuilt objects have the fingerprint that a config says, if any."""
    for line in _lines(text, FINGERPRINT):
        then = json.loads(line)
        now = fingerprint(problem, sampler())
        for name, values in then.items():
            pairs = zip(values, now.get(name, []), strict=False)
            if len(values) != len(now.get(name, [])) or not all(_near(a, b) for a, b in pairs):
                raise ValueError(
                    f"what is rebuilt from the config of {where} must be what was made in Python, "
                    f"got another {name} (frozen or initial weights, an attribute that is not the "
                    "argument of its name, or changed data): write that option by hand and remove "
                    f"the line that begins with {FINGERPRINT.strip()!r}, or go on in Python"
                )


def is_own(text: str) -> bool:
    """Whether this module wrote a config."""
    return text.startswith(HEADER)


def fingerprint(problem: Problem, sampler: TaskSampler) -> dict[str, list[float | None]]:
    """Numbers that tell task 0 and the losses at one fixed x from others."""
    random = torch.Generator().manual_seed(0)
    outer: Params = {}
    for name, leaf in problem.init_outer(torch.Generator().manual_seed(0)).items():
        noise = torch.randn(leaf.shape, generator=random).to(leaf)
        outer[name] = 0.1 * noise if leaf.is_floating_point() else leaf
    task = to_device(sample_task(sampler, 0), "cpu", next(iter(outer.values())).dtype)
    some = first_parts(task, FEW, 0) if any(map(stays_on_host, task.support.tensors)) else task
    with torch.no_grad():
        context = problem.encode(outer, task)
        start = problem.init_inner(outer, task)
        losses = [
            float(problem.inner_loss(context, start, some.support)),
            float(problem.outer_loss(context, start, some.query)),
        ]
    starts = [moment for leaf in start.values() for moment in _moments(leaf)]
    return {
        "data": _of_task(task),
        "start of adaptation": [_finite(value) for value in starts],
        "loss": [_finite(value) for value in losses],
    }


def _of_task(task: Task) -> list[float | None]:
    tensors = (*task.support.tensors, *task.query.tensors)
    return [_finite(value) for tensor in tensors for value in _moments(tensor)]


def _moments(tensor: Tensor) -> tuple[float, float]:
    rows = tensor.detach().flatten()
    # Of data that fills files, numbers here and there: all of them would have to be in memory.
    flat = rows[:: 1 + rows.numel() // MANY].cpu().double()
    return float(flat.sum()), float(flat @ torch.linspace(1, 2, len(flat), dtype=flat.dtype))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _near(then: float | None, now: float | None) -> bool:
    if then is None or now is None:
        return then is now
    return abs(then - now) <= TOLERANCE * max(1.0, abs(then))


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _lines(text: str, start: str) -> list[str]:
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def _spelled(value: Any, where: str, unknown: list[str], is_plain: bool = False) -> Any:
    """The value as options of a config; `is_plain`: a dataclass without its class."""
    value = plain(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _spelled(v, f"{where}.{k}", unknown) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(v, f"{where}[{i}]", unknown) for i, v in enumerate(value)]
    if callable(value) and hasattr(value, "__qualname__"):  # a function or a class
        return _path(value, where, unknown)
    if isinstance(value, (Tensor, Sequence)) or type(value).__module__ == "numpy":
        unknown.append(f"{where}, data of type {type(value).__name__}")
        return None
    if is_plain:
        return _arguments(value, where, unknown)
    path = _path(type(value), where, unknown)
    return {"class_path": path, "init_args": _arguments(value, where, unknown)}


def _arguments(value: Any, where: str, unknown: list[str]) -> dict[str, Any]:
    """The arguments that an object was made from."""
    made = type(value).__init__
    try:
        hints = get_type_hints(made)
    except Exception:  # noqa: BLE001  # of a user's annotations, which decide nothing that must be known
        hints = {}
    parameters = list(inspect.signature(type(value)).parameters.values())
    if is_dataclass(value):
        names = {field.name for field in fields(value) if field.init}
        parameters = [parameter for parameter in parameters if parameter.name in names]
    arguments = {}
    for parameter in parameters:
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            unknown.append(f"{where}, a {type(value).__name__} made from *{name}")
            continue
        found = getattr(value, name, unknown)
        if found is unknown or inspect.ismethod(found):
            found = getattr(value, f"_{name}", unknown)
        if found is unknown:
            unknown.append(
                f"{where}.{name}, which {type(value).__name__} does not keep (self.{name} = {name})"
            )
            continue
        if isinstance(found, nn.Module) or found is not parameter.default:
            is_plain = is_dataclass(found) and hints.get(name) is type(found)
            arguments[name] = _spelled(found, f"{where}.{name}", unknown, is_plain)
    return arguments


def _path(named: Any, where: str, unknown: list[str]) -> str:
    """The shortest import path of a class or function."""
    module, name = str(named.__module__), str(named.__qualname__)
    if module in ("__main__", "__mp_main__") or "<" in name:
        what = "a class" if isinstance(named, type) else "a function"
        unknown.append(
            f"{where}, {what} {name} of {module} (move it to the top of a module of its own)"
        )
    packages = module.split(".")
    for length in range(1, len(packages)):
        package = ".".join(packages[:length])
        if getattr(sys.modules.get(package), name, None) is named:
            return f"{package}.{name}"
    return f"{module}.{name}"
