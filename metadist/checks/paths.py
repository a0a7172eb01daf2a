"""What is said of files and folders that are not there; without NumPy, for the commands."""

from __future__ import annotations

from pathlib import Path


def absent(path: Path, kind: str) -> str:
    """Says that there is no such file or folder, and from where a relative path was looked for."""
    return f"no such {kind}" if path.is_absolute() else f"no such {kind} in {Path.cwd()}"
