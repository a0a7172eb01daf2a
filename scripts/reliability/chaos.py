"""Whether a run ends with the same bytes whoever is killed: for your own run, on your own machine.

    metadist train --config scripts/demo.yaml --run_dir runs/whole
    scripts/chaos runs/whole --kills 30 --signals 10 -- --executor ray

The first command trains undisturbed. The second trains the same configuration again, in folders
beside it, while it kills workers, parameter servers (every shard counts as one) and drivers by
SIGKILL, and sends SIGINT and SIGTERM to drivers, each at a random moment. A run whose driver is
gone is started again and continues from its newest checkpoint. When a run ends before all is done,
the next one begins. The state of every run at its end is compared with the undisturbed one. Options
after -- replace those of the configuration.

Exit codes: 0 all runs ended, with the same bytes; 1 a run was lost, ended with another exit code
than it should, or differs; 2 the input was refused. Linux only; it finds processes in /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from metadist import CheckpointError, CheckpointStore
from metadist.outer import OuterState
from metadist.run.files import CHECKPOINTS, CONFIG, EVENTS, RESULT

TITLES = {
    "worker": ("ray::Worker", "ray::ShardWorker"),
    "server": ("ray::ParameterServer",),
}
"""How the command lines of actors begin, by what can be killed beside the driver."""

SIGNALS = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
KINDS = ("worker", "server", "driver", *SIGNALS)
STARTS_WITHOUT_PROGRESS = 3
"""Starts in a row that a driver may lose before it writes a checkpoint."""


class Deed(NamedTuple):
    """One thing to do to a run: what, and how many seconds after the one before."""

    kind: str
    after_s: float


def plan(kills: int, signals: int, every_s: float, seed: int, has_actors: bool) -> list[Deed]:
    """All that is done, in random order; each kind as often as any other, or once more."""
    victims = ("worker", "server", "driver") if has_actors else ("driver",)
    kinds = [victims[number % len(victims)] for number in range(kills)]
    names = tuple(SIGNALS)
    kinds += [names[number % len(names)] for number in range(signals)]
    draw = random.Random(seed)
    draw.shuffle(kinds)
    # Times are exponential, so that deeds come in bursts as well as alone.
    return [Deed(kind, draw.expovariate(1 / every_s)) for kind in kinds]


def descendants(pid: int) -> dict[int, str]:
    """The command line of every live process below `pid`, by its id."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # Behind the name in parentheses, which may hold anything: state, parent, ...
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            try:
                line = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            found[child] = line.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def victims_of(kind: str, processes: dict[int, str]) -> list[int]:
    """The processes that are of this kind."""
    titles = TITLES[kind]
    return [pid for pid, line in processes.items() if line.startswith(titles)]


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint; -1: there is none."""
    manifests = (run / CHECKPOINTS).glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=-1)


def last_state(run: Path) -> OuterState:
    """The state that a run ended with."""
    _, checkpoint = CheckpointStore(str(run / CHECKPOINTS)).load()
    return checkpoint.state


def differences(state: OuterState, expected: OuterState) -> list[str]:
    """What differs between two states, by name; empty: they have the same bytes."""
    found = [] if state.version == expected.version else ["version"]
    for field in ("outer", "optimizer", "recursion", "states"):
        ours, theirs = getattr(state, field), getattr(expected, field)
        if ours.keys() != theirs.keys():
            found.append(field)
            continue
        for name, leaf in ours.items():
            if not torch.equal(
                leaf.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)
            ):
                found.append(f"{field} {name}")
    return found


class Disturbed:
    """A run that is started as often as it takes, while deeds are done to it.

    Args:
        config: The configuration file of the run.
        run: Its folder, new.
        flags: Options that replace those of the configuration.
        draw: Chooses among victims.
    """

    def __init__(self, config: Path, run: Path, flags: Sequence[str], draw: random.Random) -> None:
        self._command = [
            *(sys.executable, "-m", "metadist", "train", "--config", str(config)),
            *("--run_dir", str(run), "--if_exists", "continue", "--quiet", "true", *flags),
        ]
        self._run = run
        self._draw = draw
        self._log = run.with_name(f"{run.name}.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._step_at_start = -1
        self._starts_in_vain = self._begun_before = 0
        self._expected: set[int] = set()
        self.done: Counter[str] = Counter()
        self.num_starts = 0
        self.fault: str | None = None

    def disturb(self, deeds: Iterator[Deed]) -> bool:
        """Whether the run ended well; takes deeds until it ends."""
        deed: Deed | None = None
        due = 0.0
        self._start()
        while True:
            if deed is None:
                deed = next(deeds, None)
                due = time.monotonic() + deed.after_s if deed else 0.0
            code = self._await(due if deed else None)
            if code is not None:
                if code == 0 and (self._run / RESULT).exists():
                    return True
                if code not in self._expected:
                    self.fault = (
                        f"exit code {code}, due was {sorted(self._expected) or [0]}: {self._tail()}"
                    )
                    return False
                self._start()
            elif deed is not None and self._do(deed.kind):
                self.done[deed.kind] += 1
                deed = None
            else:
                time.sleep(0.05)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        step = newest_step(self._run)
        self._starts_in_vain = self._starts_in_vain + 1 if step == self._step_at_start else 0
        self._step_at_start = step
        self._expected = set()
        self._begun_before = self._num_begun()
        self.num_starts += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def _await(self, due: float | None) -> int | None:
        """The exit code, or None when it is `due` and the process lives."""
        assert self._process is not None
        try:
            # A process that got a signal ends before anything else is done to it.
            left = None if due is None or self._expected else max(0.0, due - time.monotonic())
            return self._process.wait(left)
        except subprocess.TimeoutExpired:
            return None

    def _do(self, kind: str) -> bool:
        """Whether there was somebody to do it to."""
        assert self._process is not None
        if kind in TITLES:
            victims = victims_of(kind, descendants(self._process.pid))
            if not victims:
                return False
            try:
                os.kill(self._draw.choice(victims), signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True
        is_stuck = self._starts_in_vain >= STARTS_WITHOUT_PROGRESS
        if is_stuck and newest_step(self._run) == self._step_at_start:
            return False
        if kind == "driver":
            self._process.kill()
            self._expected = {-signal.SIGKILL}
            return True
        number = SIGNALS[kind]
        # While Python imports, a signal means what the system says; 0: it came when all was done.
        self._expected = {128 + number, 0} | (set() if self._has_begun() else {-number, 1})
        self._process.send_signal(number)
        return True

    def _has_begun(self) -> bool:
        """Whether the run has reported since its last start that it trains."""
        return self._num_begun() > self._begun_before

    def _num_begun(self) -> int:
        try:
            return (self._run / EVENTS).read_bytes().count(b'"run_started"')
        except FileNotFoundError:
            return 0

    def _tail(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-5:])


def has_actors(config: str, flags: Sequence[str]) -> bool:
    """Whether the run has processes beside its driver."""
    for number, flag in enumerate(flags):
        if flag.startswith("--executor="):
            return flag != "--executor=local"
        if flag == "--executor":
            return flags[number + 1 : number + 2] != ["local"]
    return "LocalExecutor" not in config


def main() -> int:
    """The exit code, see above."""
    ours, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(
        "scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the undisturbed run, finished")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs in all")
    parser.add_argument("--signals", type=int, default=10, help="SIGINTs and SIGTERMs in all")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between, on average")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds, times and victims")
    arguments = parser.parse_args(sys.argv[1:][: len(ours.split())])
    if arguments.kills < 0 or arguments.signals < 0 or arguments.kills + arguments.signals < 1:
        parser.error("--kills and --signals must be >= 0, and one of them >= 1")
    if not arguments.every > 0:
        parser.error(f"--every must be > 0, got {arguments.every}")
    config = arguments.run / CONFIG
    if not config.exists() or not (arguments.run / RESULT).exists():
        parser.error(
            f"run must be the folder of a finished run, got {arguments.run} without {CONFIG} and "
            f"{RESULT}: train it undisturbed first"
        )
    try:
        expected = last_state(arguments.run)
    except CheckpointError as error:
        parser.error(f"run must have a good checkpoint, got {error}")
    return _chaos(arguments, config, flags.split(), expected)


def _chaos(
    arguments: argparse.Namespace, config: Path, flags: list[str], expected: OuterState
) -> int:
    actors = has_actors(config.read_text(), flags)
    deeds = plan(arguments.kills, arguments.signals, arguments.every, arguments.seed, actors)
    waiting = iter(deeds)
    draw = random.Random(arguments.seed + 1)
    done: Counter[str] = Counter()
    num_faults = number = num_starts = 0
    began = time.monotonic()
    while sum(done.values()) < len(deeds) and not num_faults:
        number += 1
        folder = arguments.run.with_name(f"{arguments.run.name}-chaos-{number}")
        if folder.exists():
            shutil.rmtree(folder)
        run = Disturbed(config, folder, flags, draw)
        try:
            ended = run.disturb(waiting)
        finally:
            run.stop()
        done += run.done
        num_starts += run.num_starts
        found = differences(last_state(folder), expected) if ended else []
        if run.fault:
            verdict = f"LOST: {run.fault}"
        else:
            verdict = f"DIFFERENT: {', '.join(found[:5])}" if found else "same bytes"
        num_faults += bool(run.fault or found)
        counts = ", ".join(f"{run.done[kind]} x {kind}" for kind in KINDS if run.done[kind])
        print(f"run {number}: {counts or 'nothing done'}; {verdict}", flush=True)
        if not run.fault and not found:
            shutil.rmtree(folder)
            folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
        if not run.done:
            print("nothing could be done before the run ended: use more steps or a smaller --every")
            return 1
    total = ", ".join(f"{done[kind]} x {kind}" for kind in KINDS if done[kind])
    seconds = time.monotonic() - began
    print(f"{total} in {number} runs with {num_starts} starts, {seconds:.0f} s")
    print(f"seed {arguments.seed}: {'FAULT' if num_faults else 'same bytes, no run lost'}")
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
