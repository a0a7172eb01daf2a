"""Whether runs end with the same bytes whoever is killed: for your own runs, on your own machine.

    metadist train --config scripts/demo.yaml --run_dir runs/whole
    scripts/chaos runs/whole --kills 30 --signals 10 -- --executor ray

The first command trains undisturbed. The second trains the same configuration again, in folders
beside it, while it kills workers, parameter servers (every shard counts as one) and drivers by
SIGKILL, and sends signals that stop a run: to drivers, to their process group, to every process of
the run, and a second one while the first is obeyed, each at a random moment. A run whose driver is
gone is started again and continues from its newest checkpoint. When a run ends before all is done,
the next one begins. The state of every run at its end is compared with the undisturbed one. Options
after -- replace those of the configuration.

Exit codes: 0 all runs ended, with the same bytes; 1 a run was lost, hung, ended with another exit
code than it should or without a last checkpoint, or differs; 2 the input was refused. Linux only;
it finds processes in /proc.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

import metadist.cli
from metadist import Checkpoint, CheckpointError, CheckpointStore
from metadist.outer import differences
from metadist.run.files import CHECKPOINTS, CONFIG, EVENTS, RESULT
from metadist.signals import STOPPING

TITLES = {
    "worker": ("ray::Worker", "ray::ShardWorker"),
    "server": ("ray::ParameterServer",),
}
"""How the command lines of actors begin, by what can be killed beside the driver."""

SIGNALS = {
    "SIGINT": signal.SIGINT,
    "SIGTERM": signal.SIGTERM,
    "SIGHUP": signal.SIGHUP,
    "SIGUSR1": signal.SIGUSR1,
}
GROUP, EVERYONE, TWICE = "signal to the group", "signal to every process", "two signals"
SENT = (*SIGNALS, GROUP, EVERYONE, TWICE)
KINDS = ("worker", "server", "driver", *SENT)
STARTS_WITHOUT_PROGRESS = 3
"""Starts in a row that a driver may lose before it writes a checkpoint."""
RUNS_IN_VAIN = 3
"""Runs in a row that may end before anything is done to them."""
EARLY = 0.2
"""The share of deeds whose time counts from the start of the driver, not from its first step."""
FRESH = 0.1
"""The share of starts as a new process; the others are forked with all modules imported."""
LIMIT_S = 300.0
"""A driver that takes longer to end after a signal, or from checkpoint to checkpoint, hangs."""


class Deed(NamedTuple):
    """One thing to do to a run: what, and how many seconds after the one before or the start.

    `is_early`: the start of the driver counts, else its first step.
    """

    kind: str
    after_s: float
    is_early: bool


def plan(kills: int, signals: int, every_s: float, seed: int, has_actors: bool) -> list[Deed]:
    """All that is done, in random order; each kind as often as any other, or once more.

    Kills of actors come several in a row, since each start of actors takes long.
    """
    victims = ("worker", "server", "driver") if has_actors else ("driver",)
    kinds = [victims[number % len(victims)] for number in range(kills)]
    kinds += [SENT[number % len(SENT)] for number in range(signals)]
    draw = random.Random(seed)
    draw.shuffle(kinds)
    # Each kind that ends the driver, after as many kills of actors as fall to it.
    starts = [[kind] for kind in kinds if kind not in TITLES] or [[]]
    actors = [kind for kind in kinds if kind in TITLES]
    chosen = draw.sample(starts, min(len(starts), 1 + len(actors) // 3))
    for kind in actors:
        draw.choice(chosen).insert(0, kind)
    # Times are exponential, so that deeds come in bursts as well as alone.
    return [
        Deed(kind, draw.expovariate(1 / every_s), draw.random() < EARLY)
        for kind in itertools.chain.from_iterable(starts)
    ]


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


def last_checkpoint(run: Path) -> Checkpoint:
    """What a run ended with."""
    return CheckpointStore(str(run / CHECKPOINTS)).load()[1]


def compare(found: Checkpoint, expected: Checkpoint) -> str:
    """What is wrong with the end of a run; empty: it has the bytes of the undisturbed one."""
    for field in ("tasks_per_lease", "chunk_size"):  # other ones round differently
        if found.info.get(field) != expected.info.get(field):
            return (
                f"NOT COMPARABLE: {field} is {found.info.get(field)} here and "
                f"{expected.info.get(field)} in the undisturbed run: train both with the same"
            )
    names = differences(found.state, expected.state)
    return f"DIFFERENT: {', '.join(names[:5])}" if names else ""


HEAD = """
import sys
import ray
from metadist.cluster.actors.connection import connect, disconnect
connect("local", 4, False, 300 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
disconnect()
"""


class Head:
    """A Ray cluster of this machine that all drivers use, which is faster than one for each."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Ray's workers would give way to whatever else the machine does.
            env={"RAY_worker_niceness": "0", **os.environ},
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError("Ray did not start")

    def actors(self) -> dict[int, str]:
        """The command lines of its workers and servers, of whatever run."""
        titles = tuple(title for some in TITLES.values() for title in some)
        below = descendants(self._process.pid)
        return {pid: line for pid, line in below.items() if line.startswith(titles)}

    def stop(self) -> None:
        """End it."""
        self._process.communicate()


def _drive(arguments: list[str], log: Path, is_fresh: bool) -> None:
    """Be a driver."""
    os.setsid()
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if is_fresh:
        os.execv(
            sys.executable, [sys.executable, "-X", "faulthandler", "-m", "metadist", *arguments]
        )
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    faulthandler.enable()
    sys.argv = ["metadist", *arguments]
    sys.exit(metadist.cli.main(arguments))


class Disturbed:
    """A run that is started as often as it takes, while deeds are done to it.

    Args:
        config: The configuration file of the run.
        run: Its folder, new.
        flags: Options that replace those of the configuration.
        draw: Chooses among victims.
        head: The cluster that its drivers use; None: each starts its own, or none.
        local_share: Of the starts that only a signal or the kill of the driver waits for, how many
            train in one process instead.
    """

    def __init__(
        self,
        config: Path,
        run: Path,
        flags: Sequence[str],
        draw: random.Random,
        head: Head | None,
        local_share: float,
    ) -> None:
        self._flags = [
            *("train", "--config", str(config), "--run_dir", str(run)),
            *("--if_exists", "continue", "--quiet", "true", *flags),
        ]
        self._run = run
        self._draw = draw
        self._head = head
        self._local_share = local_share
        self._log = run.with_name(f"{run.name}.log")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._step_at_start = -1
        self._starts_in_vain = self._begun_before = 0
        self._foreign: set[int] = set()
        self._expected: set[int] = set()
        self._must_save = False
        self._since = 0.0
        self.done: Counter[str] = Counter()
        self.starts: Counter[str] = Counter()
        self.fault: str | None = None

    def disturb(self, deeds: deque[Deed]) -> bool:
        """Whether the run ended well; takes deeds until it ends."""
        self._start(deeds)
        while True:
            assert self._process is not None
            time.sleep(0.02)  # `join` with a limit would wait for ever after an exec
            code = self._process.exitcode
            if code is not None:
                if code == 0 and (self._run / RESULT).exists():
                    return True
                if code not in self._expected:
                    self.fault = f"exit code {code}, due was {sorted(self._expected) or [0]}"
                elif self._must_save and not self._has_saved():
                    self.fault = "no checkpoint was written after the signal"
                if self.fault:
                    return False
                self._start(deeds)
            elif time.monotonic() - self._since > LIMIT_S and not self._advances():
                os.kill(self._pid, signal.SIGABRT)  # prints where it is
                self.fault = f"hangs for {LIMIT_S:g} s; awaited exit codes {self._expected}"
                time.sleep(5.0)
                return False
            elif deeds and self._is_due(deeds[0]) and self._do(deeds[0].kind):
                self._note(f"did {deeds[0].kind}")
                self.done[deeds.popleft().kind] += 1
                self._last = time.monotonic()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()

    def tail(self) -> str:
        """The last lines that it printed."""
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-5:])

    def _note(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(
                f"chaos {time.strftime('%H:%M:%S')} at step {newest_step(self._run)}: {text}\n"
            )

    @property
    def _pid(self) -> int:
        assert self._process is not None and self._process.pid is not None
        return self._process.pid

    def _start(self, deeds: deque[Deed]) -> None:
        step = newest_step(self._run)
        self._starts_in_vain = self._starts_in_vain + 1 if step == self._step_at_start else 0
        self._step_at_start = self._seen = step
        self._expected = set()
        self._must_save = False
        self._begun_before = self._num_begun()
        self._begun_at: float | None = None
        is_local = (
            bool(deeds) and deeds[0].kind not in TITLES and self._draw.random() < self._local_share
        )
        flags = list(self._flags)
        if is_local:
            flags += ["--executor", "local"]
        elif self._head is not None:
            flags += ["--executor.address", self._head.address]
            self._foreign = set(self._head.actors())  # of drivers that have ended
        is_fresh = self._draw.random() < FRESH or _has_threads()
        self.starts["in one process" if is_local else "on Ray"] += 1
        self.starts["of a new interpreter"] += is_fresh
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_drive, args=(flags, self._log, is_fresh))
        self._process.start()
        self._note(f"started {self._pid} {' '.join(flags[-2:])}, fresh: {is_fresh}")
        self._started = self._last = self._since = time.monotonic()

    def _is_due(self, deed: Deed) -> bool:
        if self._expected:  # it ends first
            return False
        if not deed.is_early and self._begun_at is None and self._has_begun():
            self._begun_at = time.monotonic()
        since = self._started if deed.is_early else self._begun_at
        return since is not None and time.monotonic() >= max(since, self._last) + deed.after_s

    def _advances(self) -> bool:
        """Whether there is a newer checkpoint than when this was last asked."""
        before, self._seen, self._since = self._seen, newest_step(self._run), time.monotonic()
        return self._seen > before and not self._expected

    def _do(self, kind: str) -> bool:
        """Whether there was somebody to do it to."""
        try:
            if kind in TITLES:
                victims = victims_of(kind, self._actors())
                if victims:
                    os.kill(self._draw.choice(victims), signal.SIGKILL)
                return bool(victims)
            is_stuck = self._starts_in_vain >= STARTS_WITHOUT_PROGRESS
            if is_stuck and newest_step(self._run) == self._step_at_start:
                return False
            if kind == "driver":
                os.kill(self._pid, signal.SIGKILL)
                self._expected = {-signal.SIGKILL}
            else:
                self._signal(kind)
        except ProcessLookupError:
            return False
        self._since = time.monotonic()
        return True

    def _signal(self, kind: str) -> None:
        name = kind if kind in SIGNALS else self._draw.choice(list(SIGNALS))
        number = SIGNALS[name]
        has_begun = self._has_begun()
        if kind == GROUP:
            os.killpg(self._pid, number)
        elif kind == EVERYONE:
            others = {*self._actors(), *descendants(self._pid)}
            os.kill(self._pid, number)
            for pid in others:
                with suppress(ProcessLookupError):  # it has ended in the meantime
                    os.kill(pid, number)
        else:
            os.kill(self._pid, number)
        # 0: it came when all was done.
        self._expected = {0, _exit_code(number)}
        if not has_begun:  # while Python imports, a signal means what the system says
            self._expected |= {-number, 1}
        self._must_save = has_begun
        if kind == TWICE:
            time.sleep(self._draw.expovariate(2.0))
            second = SIGNALS[self._draw.choice(list(SIGNALS))]
            with suppress(ProcessLookupError):
                os.kill(self._pid, second)
            # The same again, for a driver that has obeyed the first one already.
            self._expected |= {_exit_code(second), -second}

    def _actors(self) -> dict[int, str]:
        """The command lines of the workers and servers of this run."""
        if self._head is None:
            return descendants(self._pid)
        actors = self._head.actors()
        return {pid: line for pid, line in actors.items() if pid not in self._foreign}

    def _has_saved(self) -> bool:
        """Whether the last that the run did was to write its newest checkpoint."""
        last = json.loads((self._run / EVENTS).read_text().splitlines()[-1])
        is_whole = last["event"] in ("checkpoint_written", "run_finished")
        return is_whole and last["step"] == newest_step(self._run)

    def _has_begun(self) -> bool:
        """Whether the run has reported since its last start that it trains."""
        return self._num_begun() > self._begun_before

    def _num_begun(self) -> int:
        try:
            return (self._run / EVENTS).read_bytes().count(b'"run_started"')
        except FileNotFoundError:
            return 0


def has_actors(config: str, flags: Sequence[str]) -> bool:
    """Whether the run has processes beside its driver."""
    for number, flag in enumerate(flags):
        if flag.startswith("--executor="):
            return flag != "--executor=local"
        if flag == "--executor":
            return flags[number + 1 : number + 2] != ["local"]
    return "LocalExecutor" not in config


class Target:
    """A finished run that is trained again and disturbed, as often as there are deeds left."""

    def __init__(self, run: Path, deeds: list[Deed], expected: Checkpoint, seed: int) -> None:
        self.run = run
        self.deeds = deque(deeds)
        self._expected = expected
        self._draw = random.Random(seed)
        self._seconds = 0.0
        self._done: Counter[str] = Counter()
        self._starts: Counter[str] = Counter()
        self._num_runs = self._in_vain = 0

    def once(self, flags: list[str], head: Head | None, local_share: float) -> bool:
        """Train it once; whether nothing was wrong."""
        began = time.monotonic()
        self._num_runs += 1
        folder = self.run.with_name(f"{self.run.name}-chaos-{self._num_runs}")
        if folder.exists():
            shutil.rmtree(folder)
        run = Disturbed(self.run / CONFIG, folder, flags, self._draw, head, local_share)
        try:
            ended = run.disturb(self.deeds)
        finally:
            run.stop()
            self._done += run.done
            self._starts += run.starts
            self._seconds += time.monotonic() - began
        if run.fault:
            fault = f"LOST: {run.fault}: {run.tail()}"
        else:
            fault = compare(last_checkpoint(folder), self._expected) if ended else ""
        done = _counts(run.done, KINDS) or "nothing done"
        print(f"{folder.name}: {done}; {fault or 'same bytes'}", flush=True)
        if fault:
            return False
        self._in_vain = 0 if run.done else self._in_vain + 1
        if self.deeds and not run.done:  # it came too late for this run
            self.deeds[0] = self.deeds[0]._replace(after_s=self.deeds[0].after_s / 4)
            if self._in_vain == RUNS_IN_VAIN:
                print("nothing could be done before the runs ended: use more steps")
                return False
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.log").unlink(missing_ok=True)
        return True

    def __str__(self) -> str:
        starts = _counts(self._starts, ("on Ray", "in one process", "of a new interpreter"))
        return (
            f"{self.run.name}: {_counts(self._done, KINDS)}; {self._num_runs} runs, "
            f"{self._starts['on Ray'] + self._starts['in one process']} starts ({starts}), "
            f"{self._seconds:.0f} s"
        )


def _import_all() -> None:
    """Import what a driver uses, so that forked ones have it."""
    torch.set_num_threads(1)
    for name in (
        *("ray", "torch._dynamo", "torch.utils.tensorboard"),
        *("cluster.parameter_server.executor", "cli.train", "run.monitor", "algorithms", "tasks"),
    ):
        importlib.import_module(name if "torch" in name or name == "ray" else f"metadist.{name}")


def _has_threads() -> bool:
    """Whether this process must not be forked."""
    return len(list(Path("/proc/self/task").iterdir())) > 1


def _exit_code(number: int) -> int:
    """That of a driver which a signal has stopped."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


def _counts(done: Counter[str], kinds: Sequence[str]) -> str:
    return ", ".join(f"{done[kind]} x {kind}" for kind in kinds if done[kind])


def main() -> int:
    """The exit code, see above."""
    ours, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(
        "scripts/chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="+", help="folders of undisturbed runs, finished")
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs of each")
    parser.add_argument("--signals", type=int, default=10, help="signals of each")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between, on average")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds, times and victims")
    parser.add_argument(
        "--one_cluster", action="store_true", help="all drivers use one Ray cluster of this machine"
    )
    parser.add_argument(
        "--local_share",
        type=float,
        default=0.0,
        help="the share of starts in one process, of those whose next deed concerns the driver",
    )
    arguments = parser.parse_args(sys.argv[1:][: len(ours.split())])
    if arguments.kills < 0 or arguments.signals < 0 or arguments.kills + arguments.signals < 1:
        parser.error("--kills and --signals must be >= 0, and one of them >= 1")
    if not arguments.every > 0:
        parser.error(f"--every must be > 0, got {arguments.every}")
    if not 0 <= arguments.local_share <= 1:
        parser.error(f"--local_share must be between 0 and 1, got {arguments.local_share}")
    targets = []
    for number, run in enumerate(arguments.run):
        config = run / CONFIG
        if not config.exists() or not (run / RESULT).exists():
            parser.error(
                f"run must be the folder of a finished run, got {run} without {CONFIG} and "
                f"{RESULT}: train it undisturbed first"
            )
        try:
            expected = last_checkpoint(run)
        except CheckpointError as error:
            parser.error(f"run must have a good checkpoint, got {error}")
        deeds = plan(
            arguments.kills,
            arguments.signals,
            arguments.every,
            arguments.seed + number,
            has_actors(config.read_text(), flags.split()),
        )
        targets.append(Target(run, deeds, expected, arguments.seed + number))
    return _chaos(targets, flags.split(), arguments)


def _chaos(targets: list[Target], flags: list[str], arguments: argparse.Namespace) -> int:
    head = None
    if arguments.one_cluster:
        head = Head()
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as a cluster of one machine has it
    _import_all()
    num_faults = 0
    began = time.monotonic()
    try:
        while not num_faults and any(target.deeds for target in targets):
            for target in targets:
                if target.deeds and not num_faults:
                    num_faults += not target.once(flags, head, arguments.local_share)
    finally:
        if head is not None:
            head.stop()
        for target in targets:
            print(target)
        print(
            f"seed {arguments.seed}, {time.monotonic() - began:.0f} s: "
            f"{'FAULT' if num_faults else 'same bytes, no run lost'}",
            flush=True,
        )
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
