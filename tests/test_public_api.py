"""The public names: those of tests/public_api.txt, one a line. Every other name is private.

To add, rename or remove one on purpose, edit its line there.
"""

import importlib
from pathlib import Path

import pytest

MODULES = (
    "metadist",
    "metadist.algorithms",
    "metadist.cluster",
    "metadist.compare",
    "metadist.models",
    "metadist.tasks",
)
PINNED = Path(__file__).with_name("public_api.txt").read_text().split()


def test_the_public_names_are_the_pinned_ones():
    names = [f"{m}.{name}" for m in MODULES for name in importlib.import_module(m).__all__]
    assert sorted(names) == PINNED, "edit tests/public_api.txt if this is meant"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module):
    module = importlib.import_module(module)
    for name in module.__all__:
        assert getattr(module, name) is not None
