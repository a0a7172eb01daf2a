"""`metadist doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.workload import add_workload

OLDEST_PYTHON = (3, 10)
SMALL_DISK_BYTES = 2_000_000_000
SMALL_MEMORY_BYTES = 1_000_000_000
SLOW_BYTES_PER_S = 20e6


class Finding(NamedTuple):
    """One line: "ok", "note" (works, with something to know) or "BROKEN", and the way out."""

    level: Literal["ok", "note", "BROKEN"]
    name: str
    text: str
    way_out: str = ""


def parser() -> Parser:
    """Options of `metadist doctor`."""
    parser = Parser(
        prog="metadist doctor",
        description="Say what of this machine, of a running cluster and of a model works, and what "
        "to do where it does not. Exit code 1 if something that is needed is broken.",
    )
    add_workload(parser)
    parser.first["--sampler"] = "glyphs"
    parser.add_argument(
        "--address",
        type=str | None,
        help="A running Ray cluster whose nodes are reached; by default RAY_ADDRESS, or none.",
    )
    parser.add_argument(
        "--run_dir", type=str, default=".", help="Where runs will be written, for the free space."
    )
    parser.add_argument("--seed", type=int, default=0, help="The seed of the model's weights.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist doctor`; exit code 1 if something that is needed is broken."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Python", python),
        ("torch", torch_works),
        ("GPU", gpu),
        ("Ray", ray_installed),
        ("token", token),
        ("shared memory", lambda: shared_memory(Path("/dev/shm"))),
        ("disk", lambda: disk(Path(config.run_dir))),
        ("network", lambda: network(config.address or os.environ.get("RAY_ADDRESS"))),
        ("model", lambda: model(config)),
    ]
    is_broken = False
    for name, check in checks:
        try:
            for finding in check():
                is_broken |= finding.level == "BROKEN"
                _say(finding)
        except Exception as error:  # noqa: BLE001  # whatever is broken, the other lines are said
            is_broken = True
            _say(Finding("BROKEN", name, f"{type(error).__name__}: {error}"))
    return int(is_broken)


def _say(finding: Finding) -> None:
    print(f"{finding.level:7} {finding.name}: {finding.text}", flush=True)
    if finding.way_out:
        print(f"        -> {finding.way_out}")


def python() -> Iterator[Finding]:
    """The interpreter."""
    text = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("BROKEN", "Python", text, "install Python 3.10 or newer")
    else:
        yield Finding("ok", "Python", text)


def torch_works() -> Iterator[Finding]:
    """A second derivative by torch, which everything stands on."""
    import torch

    x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    text = f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.allclose(second, 6 * x):
        yield Finding("ok", "torch", text)
    else:
        yield Finding("BROKEN", "torch", f"{text}: d2(x^3) is {second.tolist()}", "reinstall torch")
    if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        yield Finding(
            "note", "compiler", "no C++ compiler", "install g++ for compile=True; all else works"
        )


def gpu() -> Iterator[Finding]:
    """A second derivative on each GPU."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            yield Finding("note", "GPU", "none: runs compute on the CPU")
            return
        built = torch.version.cuda
        way_out = (
            "install a build of torch for CUDA (pytorch.org/get-started)"
            if built is None
            else "compare the driver (nvidia-smi) with torch's CUDA, and CUDA_VISIBLE_DEVICES"
        )
        found = "built for the CPU" if built is None else f"of CUDA {built} that sees no GPU"
        yield Finding("BROKEN", "GPU", f"nvidia-smi is here, and torch is {found}", way_out)
        return
    for number in range(torch.cuda.device_count()):
        name = f"{torch.cuda.get_device_name(number)} (cuda:{number})"
        free, total = torch.cuda.mem_get_info(number)
        x = torch.ones(64, 64, device=f"cuda:{number}", requires_grad=True)
        (slope,) = torch.autograd.grad((x @ x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
        text = f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if not bool(second.isfinite().all()):
            yield Finding("BROKEN", "GPU", f"{text}: no second derivative", "reinstall torch")
        elif free < total / 2:
            way_out = "end what else computes there (nvidia-smi), or pick another GPU"
            yield Finding("note", "GPU", f"{text}: others use it", way_out)
        else:
            yield Finding("ok", "GPU", text)


def ray_installed() -> Iterator[Finding]:
    """Ray, which only runs on several processes need."""
    try:
        yield Finding("ok", "Ray", version("ray"))
    except PackageNotFoundError:
        way_out = "pip install ray for --executor ray; one process needs none"
        yield Finding("note", "Ray", "not installed", way_out)


def token() -> Iterator[Finding]:
    """The token that the machines of a cluster know one another by."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("ok", "token", "in RAY_AUTH_TOKEN")
    elif not path.is_file():
        way_out = (
            "a run on this machine makes one; to join a cluster, type `mkdir -p "
            f"{path.parent} && scp HEAD:.ray/auth_token {path} && export RAY_AUTH_MODE=token`"
        )
        yield Finding("note", "token", "none", way_out)
    elif stat.S_IMODE(path.stat().st_mode) & 0o077:
        yield Finding("note", "token", f"{path} can be read by others", f"chmod 600 {path}")
    else:
        yield Finding("ok", "token", str(path))


def shared_memory(folder: Path) -> Iterator[Finding]:
    """Where Ray keeps what processes share."""
    if not folder.is_dir():
        yield Finding("note", "shared memory", f"no {folder}", "Ray uses files in its place")
        return
    usage = shutil.disk_usage(folder)
    text = f"{folder}, {usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if usage.free < SMALL_MEMORY_BYTES:
        way_out = (
            "start the container with --shm-size=2g, or pass --executor.object_store_bytes; else "
            "Ray uses slow files in /tmp"
        )
        yield Finding("note", "shared memory", text, way_out)
    else:
        yield Finding("ok", "shared memory", text)


def disk(run_dir: Path) -> Iterator[Finding]:
    """Space for checkpoints, and for Ray's files."""
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    for name, folder in (("disk", existing), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        text = f"{folder}, {free / 1e9:.1f} GB free"
        if not os.access(folder, os.W_OK):
            yield Finding("BROKEN", name, f"{folder} cannot be written to", "pass another folder")
        elif free < SMALL_DISK_BYTES:
            way_out = "make room, or pass a --run_dir elsewhere (any fsspec URI), and set TMPDIR"
            yield Finding("BROKEN", name, text, way_out)
        else:
            yield Finding("ok", name, text)


def network(address: str | None) -> Iterator[Finding]:
    """The nodes of a running cluster."""
    if not address:
        yield Finding("note", "network", "not tried", "pass --address auto on a node of a cluster")
        return
    from metadist.cluster import reach_nodes, versions

    ours = versions()
    for node in reach_nodes(address):
        text = f"{node.node}, {node.bytes_per_s / 1e6:.0f} MB/s, {node.versions}"
        if node.error is not None:
            way_out = "open the ports between the nodes, see `ray status` and docs/cluster.md"
            yield Finding("BROKEN", "network", f"{node.node}: {node.error}", way_out)
        elif node.versions != ours:
            way_out = f"install the same everywhere; here are {ours}"
            yield Finding("BROKEN", "network", text, way_out)
        elif node.bytes_per_s < SLOW_BYTES_PER_S:
            yield Finding("note", "network", text, "use --executor.compression bfloat16")
        else:
            yield Finding("ok", "network", text)


def model(config: Namespace) -> Iterator[Finding]:
    """The model and the method on one task: what training will ask of them."""
    from dataclasses import replace

    from metadist.checks.preflight import initial_outer, preflight
    from metadist.chunks import FAILS_UNDER_VMAP
    from metadist.cli.workload import instantiate
    from metadist.hypergradient import task_hypergradients
    from metadist.sampler import sample_task
    from metadist.task import to_device
    from metadist.workload import Workload

    try:
        objects = instantiate(config, parser())
    except ValueError as error:
        yield Finding("BROKEN", "model", *_parts(error))
        return
    problem, algorithm = objects.problem, objects.algorithm
    workload = Workload(problem, objects.sampler, algorithm)
    described = ", ".join(f"{name} {value}" for name, value in problem.describe().items())
    name = f"{type(problem).__name__} ({described})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is said below
            outer = initial_outer(workload)
            preflight(workload, outer)
    except ValueError as error:
        yield Finding("BROKEN", "model", *_parts(error))
        return
    yield Finding(
        "ok", "model", f"{name}: pure, no dropout, no in-place operation, two derivatives"
    )
    dtype = next(iter(outer.values())).dtype
    tasks = [to_device(sample_task(objects.sampler, i), "cpu", dtype) for i in range(2)]
    compute = replace(workload.compute, vectorize=True, device="cpu")
    try:
        task_hypergradients(problem, algorithm, outer, tasks, compute=compute, is_checked=True)
    except (ValueError, *FAILS_UNDER_VMAP) as error:
        reason = str(error).splitlines()[0]
        way_out = "nothing to do: tasks go one at a time, in every worker alike"
        yield Finding("note", "vmap", f"does not run it: {reason}", way_out)
    else:
        yield Finding("ok", "vmap", "runs several tasks together")


def _parts(error: Exception) -> tuple[str, str]:
    """(what is wrong, the way out) of a message of the form RULE, VALUE: WAY OUT."""
    text, _, way_out = str(error).rpartition(": ")
    return (text, way_out) if text else (way_out, "")
