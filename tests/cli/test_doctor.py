"""`metadist doctor`: each line, and what it says where something is broken."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from metadist.cli import doctor
from metadist.cluster import versions
from tests.helpers import words

SMALL = words(
    "--sampler.n_way 3 --sampler.k_query 2 --problem.model.n_way 3 --problem.model.width 4 "
    "--algorithm.inner_steps 1"
)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))


def lines(cli, *flags):
    code, out, err = cli("doctor", *SMALL, *flags)
    return code, out + err


def test_a_machine_that_works_has_no_broken_line(cli):
    code, out = lines(cli)
    assert code == 0, out
    assert "BROKEN" not in out
    for name in ("Python", "torch", "Ray", "shared memory", "disk", "temporary files"):
        assert f" {name}: " in out
    assert "ok      model: FewShotProblem (model Conv4" in out
    assert "ok      vmap: runs several tasks together" in out
    assert "note    token: none\n        -> a run on this machine makes one" in out
    assert "note    network: not tried\n        -> pass --address auto" in out


MODELS = """
import torch
from torch import nn

class Base(nn.Module):
    def __init__(self, n_way: int = 3, width: int = 4):
        super().__init__()
        self.head = nn.Linear(784, n_way)
        self.extra()
    def extra(self): pass
    def forward(self, x):
        return self.head(x.flatten(1))

class Dropping(Base):
    def extra(self):
        self.drop = nn.Dropout(0.5)

class Normed(Base):
    def extra(self):
        self.norm = nn.BatchNorm2d(1)

class Noisy(Base):
    def forward(self, x):
        return self.head(x.flatten(1)) + torch.randn(())

class InPlace(Base):
    def forward(self, x):
        return self.head(x.mul_(2).flatten(1))

class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

class Once(Base):
    def forward(self, x):
        return Squared.apply(self.head(x.flatten(1)))

class OneByOne(Base):
    def forward(self, x):
        out = self.head(x.flatten(1))
        return out if float(out.sum()) > 1e9 else 2 * out
"""


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("Dropping", "BROKEN  model", "dropout must be off in the inner loop, layer 'drop'"),
        ("Normed", "BROKEN  model", "with_task_batch_norm(model)"),
        ("Noisy", "BROKEN  model", "random"),
        ("InPlace", "BROKEN  model", "changed in place"),
        ("Once", "BROKEN  model", "once_differentiable"),
        ("OneByOne", "note    vmap", "tasks go one at a time"),
    ],
)
def test_what_a_model_cannot_do_is_said_with_the_way_out(cli, here, name, level, message):
    (here / "mine.py").write_text(MODELS)
    code, out = lines(cli, "--problem.model", f"mine.{name}")
    assert code == (1 if "BROKEN" in level else 0), out
    assert level in out and message in out.partition(level)[2] and "\n        -> " in out


def texts(findings):
    return [f"{finding.level} {finding.name}: {finding.text}" for finding in findings]


def test_a_full_disk_and_little_shared_memory_are_found(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=50_000_000, total=64_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = list(doctor.shared_memory(tmp_path))
    assert found[0].level == "note" and "--shm-size" in found[0].way_out
    found = list(doctor.disk(tmp_path / "not" / "yet"))
    assert [finding.level for finding in found] == ["BROKEN", "BROKEN"]
    assert found[0].text.startswith(str(tmp_path)) and "make room" in found[0].way_out
    (missing,) = doctor.shared_memory(Path("/nowhere"))
    assert missing.level == "note"


def test_a_token_is_to_be_private(tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.chmod(0o644)
    (found,) = doctor.token()
    assert (found.level, found.way_out) == ("note", f"chmod 600 {path}")
    path.chmod(0o600)
    (found,) = doctor.token()
    assert found.level == "ok"
    assert "secret" not in found.text


def test_a_torch_that_does_not_fit_the_machine_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = doctor.gpu()
    assert found.level == "BROKEN" and "build of torch for CUDA" in found.way_out
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (found,) = doctor.gpu()
    assert found.level == "BROKEN" and "CUDA_VISIBLE_DEVICES" in found.way_out
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = doctor.gpu()
    assert found.level == "note"


def test_one_check_that_fails_does_not_keep_the_others_from_being_made(cli, monkeypatch):
    def fails():
        yield doctor.Finding("ok", "torch", "so far")
        raise OSError("no torch today")

    monkeypatch.setattr(doctor, "torch_works", fails)
    code, out = lines(cli)
    assert code == 1
    assert "BROKEN  torch: OSError: no torch today" in out and "ok      model" in out


def test_nodes_of_other_versions_or_out_of_reach_are_broken(monkeypatch):
    from metadist import cluster

    nodes = [
        SimpleNamespace(node="a", versions=versions(), bytes_per_s=1e9, error=None),
        SimpleNamespace(node="b", versions="Python 3.9", bytes_per_s=1e9, error=None),
        SimpleNamespace(node="c", versions="", bytes_per_s=0.0, error="timed out"),
        SimpleNamespace(node="d", versions=versions(), bytes_per_s=1e6, error=None),
    ]
    monkeypatch.setattr(cluster, "reach_nodes", lambda address: nodes)
    found = list(doctor.network("auto"))
    assert [finding.level for finding in found] == ["ok", "BROKEN", "BROKEN", "note"]
    assert versions() in found[1].way_out


@pytest.mark.slow
def test_the_nodes_of_a_cluster_are_reached():
    from metadist.cluster import reach_nodes

    (node,) = reach_nodes("local")
    assert node.error is None and node.versions == versions() and node.bytes_per_s > 0
    assert not ray.is_initialized()


def test_no_cluster_where_one_was_named_is_broken(cli):
    code, out = lines(cli, "--address", "127.0.0.1:1")
    assert code == 1 and "BROKEN  network: ConnectError: " in out
