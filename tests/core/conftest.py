"""Fixtures of the tests of core."""

import pytest

from tests.core.helpers import CommandLine


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)
