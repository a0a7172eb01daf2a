"""Files that a problem shows of what it has learned."""

from __future__ import annotations

import pytest
import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD, SOBA
from metadist.report import run_page
from metadist.run.status import run_status
from metadist.run.storage import Folder
from metadist.tasks import FixedTasks
from metadist.trees import Params
from tests.problems import Quadratic, QuadraticSampler, quadratic_task


class Shown(Quadratic):
    name = "x.txt"

    def artifacts(self, outer: Params, inner: Params | None) -> dict[str, bytes]:
        of = None if inner is None else inner["y"].tolist()
        return {self.name: repr((sorted(outer), outer["x"].tolist(), of)).encode()}


def trainer(problem: Shown, run_dir: str, **options: object) -> Trainer:
    task = FixedTasks([quadratic_task(0)])
    defaults: dict[str, object] = {"sampler": task, "algorithm": SOBA(), **options}
    return Trainer(
        problem,
        outer_optimizer=OuterOptimizer("sgd", lr=0.1),
        run_dir=run_dir,
        quiet=True,
        **defaults,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("where", ["file", "memory"])
def test_files_come_with_each_validation_and_at_the_end(tmp_path, where):
    uri = str(tmp_path / "run") if where == "file" else f"memory://{tmp_path}/run"
    kept = trainer(Shown(2, 4), uri, val_sampler=FixedTasks([quadratic_task(1)] * 2), val_every=2)
    kept.fit(3)
    folder = Folder(f"{uri}/artifacts")
    assert sorted(folder.names()) == ["step-00000002", "step-00000003"]
    data = (folder / "step-00000003").read("x.txt", 1000).decode()
    assert data == repr((["x"], kept.outer["x"].tolist(), kept.inner(0)["y"].tolist()))
    status = run_status(uri)
    assert status.artifacts == ["step-00000002", "step-00000003"]
    assert status.artifact_files == ["x.txt"]
    line = "artifacts/step-00000003 (1 older): x.txt"
    assert ("artifacts", line) in list(status._rows())
    assert f"files of the problem, by outer step; {line}" in run_page(uri)
    again = trainer(Shown(2, 4), uri)
    again.restore()
    again.fit(4)
    assert max(folder.names()) == "step-00000004"


def test_without_kept_states_there_is_no_inner_variable(tmp_path):
    run = trainer(
        Shown(2, 4),
        str(tmp_path),
        sampler=QuadraticSampler(),
        algorithm=ITD(inner_steps=1),
        meta_batch_size=2,
    )
    run.fit(1)
    text = (tmp_path / "artifacts" / "step-00000001" / "x.txt").read_text()
    assert text == repr((["x"], run.outer["x"].tolist(), None))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_is_lost(tmp_path, name):
    problem = Shown(2, 4)
    problem.name = name
    run = trainer(problem, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="artifacts must be bytes by names of letters"):
        run.fit(2)
    again = trainer(Shown(2, 4), str(tmp_path / "run"))
    assert again.restore() == "step-00000002"
    assert torch.equal(again.outer["x"], run.outer["x"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (None, "artifacts must return a dict of bytes by name, got NoneType"),
        ({3: b""}, "artifacts must be bytes by names .* got bytes by the name 3"),
    ],
)
def test_what_is_no_dict_of_bytes_by_name_is_refused(tmp_path, monkeypatch, shown, message):
    monkeypatch.setattr(Shown, "artifacts", lambda self, outer, inner: shown)
    with pytest.raises(ValueError, match=message):
        trainer(Shown(2, 4), str(tmp_path / "run")).fit(2)
