"""How code reaches the workers: the user's own inside the pickled workload, metadist as a module.

A class in `my_tasks.py` beside the user's script is not installed on any node. So everything
from the user's own modules is pickled by value: no files are shipped, and nothing needs a restart
after an edit. Two cases need the files on the nodes all the same (`ray job submit --working-dir .`,
or an installed package): a module that is imported only while a task is sampled or computed, and a
module whose state cannot be pickled.
"""

from __future__ import annotations

import pickle
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ray import cloudpickle

import metadist
from metadist.cluster.actors.errors import ClusterError

LIGHT_DEPENDENCIES = (
    "fsspec",
    "higher>=0.2.1",
    "jsonargparse[signatures]>=4.49",
    "rich",
    "safetensors",
    "tensorboard",
)
"""The dependencies without PyTorch, torchvision, numpy and Ray, which pip could replace."""


def pickle_by_value(value: Any) -> bytes:
    """`value` pickled so that it can be loaded where the user's modules do not exist.

    Raises:
        ClusterError: A part of it cannot be pickled.
    """
    with _by_value(user_modules()):
        try:
            payload: bytes = cloudpickle.dumps(value)
        except _UNPICKLABLE as error:
            where, part = _culprit(value)
            at = f" in {where}, a {type(part).__name__}" if where else ""
            raise ClusterError(
                "problem, sampler and algorithm must be picklable to reach the workers, got: "
                f"{error}{at}. Open files, locks and the like inside their methods, and keep them "
                "out of attributes and of the globals that the methods use"
            ) from error
    return payload


_UNPICKLABLE = (TypeError, AttributeError, pickle.PicklingError, RuntimeError)


def _culprit(value: Any, where: str = "", depth: int = 8) -> tuple[str, Any]:
    """(name, part) of the innermost part of `value` that cannot be pickled; "": it is itself."""
    parts: dict[str, Any] = {}
    if isinstance(value, dict):
        parts = {f"{where}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"{where}[{number}]": item for number, item in enumerate(value)}
    elif not isinstance(value, type):
        names = getattr(value, "__dict__", {})
        parts = {f"{where}.{name}".lstrip("."): item for name, item in names.items()}
    for name, part in parts.items() if depth else ():
        try:
            cloudpickle.dumps(part)
        except _UNPICKLABLE:
            return _culprit(part, name, depth - 1)
    return where, value


def metadist_runtime_env() -> dict[str, Any]:
    """A Ray `runtime_env` that ships this metadist to a cluster whose nodes lack it.

    For `ray.init(runtime_env=...)` before a `RayExecutor` is started; Ray accepts it for a whole
    job only, and not from inside `ray job submit`. The nodes need PyTorch, numpy and Ray; each
    installs `LIGHT_DEPENDENCIES` with pip into an environment of the job.
    """
    return {
        "py_modules": [str(Path(metadist.__file__).parent)],
        "excludes": ["**/__pycache__/"],
        "pip": {"packages": list(LIGHT_DEPENDENCIES), "pip_check": False},
    }


def user_modules() -> list[ModuleType]:
    """The loaded modules that are neither Python's, nor installed packages, nor metadist's."""
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and module.__name__ == name and _is_users(module)
    ]


def _is_users(module: ModuleType) -> bool:
    # __main__ is always pickled by value; modules without a file are built in.
    file = vars(module).get("__file__")
    if not isinstance(file, str) or module.__name__.partition(".")[0] in ("metadist", "__main__"):
        return False
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False  # of another environment, through a .pth file
    return not any(path.is_relative_to(folder) for folder in _installed_folders())


@lru_cache(maxsize=1)
def _installed_folders() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({Path(folder).resolve() for folder in folders})


@contextmanager
def _by_value(modules: list[ModuleType]) -> Iterator[None]:
    """Within the block `modules` are pickled by value."""
    known = cloudpickle.list_registry_pickle_by_value()
    added = [module for module in modules if module.__name__ not in known]
    for module in added:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)
