"""docs/problems.md: what it names is there."""

from pathlib import Path

from metadist.cli.names import class_path, named
from metadist.tasks.data.sources import SOURCES

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "problems.md").read_text()
NEW = (
    "CorruptedImages LongTail TextFeatures QuadraticData LancBiOData LancBiOMatrixFreeData "
    "SparseRegressionData NoData LinearClassifier"
)


def test_every_problem_is_described_and_has_a_short_name():
    # The others are in docs/tasks.md.
    few_shot = {"FewShotProblem", "LinearProbe", "NearestCentroid", "ProtoNet", "RidgeHead"}
    problems = {cls.name for cls in named("problems").values()} - few_shot
    for name in (*problems, *NEW.split()):
        assert f"`{name}`" in TEXT or f"{name}(" in TEXT, name
        kind = "problems" if name in problems else "samplers"
        assert name == "LinearClassifier" or class_path(kind, name) == f"metadist.tasks.{name}"
    assert all(f"| {name} |" in TEXT for name in SOURCES)


def test_lines_are_short_outside_of_tables():
    assert not [line for line in TEXT.splitlines() if len(line) > 100 and line[0] != "|"]
