"""The public names: those of tests/public_api.txt, one a line. Every other name is private.

To add, rename or remove one on purpose, edit its line there.
"""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "metadist",
    "metadist.algorithms",
    "metadist.cluster",
    "metadist.compare",
    "metadist.loggers",
    "metadist.models",
    "metadist.tasks",
    "metadist.tasks.language",
)
PINNED = Path(__file__).with_name("public_api.txt").read_text().split()


def test_the_public_names_are_the_pinned_ones():
    names = [f"{m}.{name}" for m in MODULES for name in importlib.import_module(m).__all__]
    assert sorted(names) == PINNED, "edit tests/public_api.txt if this is meant"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there_and_travels_by_reference(module):
    package = importlib.import_module(module)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        found = getattr(package, name)
        if isinstance(found, type):
            assert pickle.loads(pickle.dumps(found)) is found
        scope: dict[str, object] = {}
        exec(f"from {module} import {name}", scope)
        assert scope[name] is found


@pytest.mark.parametrize("module", MODULES)
def test_other_names_are_refused(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Trainr'"):
        _ = importlib.import_module(module).Trainr
    with pytest.raises(ImportError, match="cannot import name 'Trainr'"):
        exec(f"from {module} import Trainr")


def test_importing_a_package_imports_no_torch_until_a_name_is_used():
    modules = ("metadist", "metadist.tasks", "metadist.cluster", "metadist.tasks.language")
    lines = ["import sys"]
    for module in modules:
        lines += [f"import {module}", "assert not {'torch', 'ray'} & set(sys.modules)"]
    for module in modules:
        view = importlib.import_module(module).__all__[0]
        lines += [f"from {module} import *", f"assert {view} is {module}.{view}"]
        lines += ["assert 'torch' in sys.modules"]
    unused = "{'transformers', 'peft', 'tokenizers', 'datasets'}"
    lines += [f"assert not {unused} & set(sys.modules)"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
