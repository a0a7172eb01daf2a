"""Processes: which one this is, what it runs on, and whether another one has ended."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What tells this process from others: its machine, number, and start."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": boot(), "pid": pid, "started": started(pid)}


def software() -> list[str]:
    """What a process here runs on, in words: versions, the system, CPUs and GPU."""
    import torch

    words = [
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"{platform.system()} {platform.machine()}",
        f"{os.cpu_count()} CPUs",
    ]
    if torch.cuda.is_available():
        words.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return words


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether the process is known to have ended; False where that cannot be told from here."""
    pid = process.get("pid")
    here = {"host": socket.gethostname(), "boot": boot()}
    if type(pid) is not int or not 0 < pid < 1 << 31 or not here.items() <= process.items():
        return False
    return is_alive(pid, str(process.get("started"))) is False


def is_alive(pid: int, since: str) -> bool | None:
    """Whether the process of this machine that `started` then is there; None if nobody can say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # there is one, of another user
    now = started(pid)
    # Another one may have the number by now; a dead one whose parent has not noticed has it still.
    # Where other users' processes are hidden, nothing is known of it.
    return now == since if now else None


def boot() -> str:
    """What tells where the number of a process counts; "" where it is unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Each container of a machine has numbers of its own.
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def started(pid: int) -> str:
    """When it started, in clock ticks since boot; "dead" for a zombie; "" where it is unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in "ZX" else fields[19]
