"""What tests of several commands share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def saved(run: str = "run") -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(run, "result.json").read_text())
    return result


def damage(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")


def flat(text: str) -> str:
    """Text of a table without its lines and line breaks."""
    return re.sub(r"[\s│┃━┏┓┗┛└┘┌┐├┤─┬┴┼┡┩╇]+", " ", text)
