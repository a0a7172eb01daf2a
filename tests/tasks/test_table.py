"""Tables of rows: CSV files, data frames, columns."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.tasks import Table, check_sampler
from tests.tasks.helpers import refusal

TRAIN: dict[str, list[Any]] = {"a": [1, 2, 3, 6], "b": [5.0] * 4, "kind": ["x", "y", "x", "y"]}
VAL: dict[str, list[Any]] = {"kind": ["y", "x"], "b": [5, 6], "a": [3.5, 4]}


def write(file: Path, rows: dict[str, list[Any]]) -> Path:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(rows)
        writer.writerows(zip(*rows.values(), strict=True))
    return file


def test_features_are_scaled_as_in_training_and_classes_numbered():
    table = Table(TRAIN, VAL, label="kind")
    check_sampler(table, processes=False)
    support, query, _ = table.sample(0)
    column = torch.tensor([-2.0, -1, 0, 3]) / 3.5**0.5
    torch.testing.assert_close(support.tensors[0], torch.stack([column, torch.zeros(4)], 1))
    assert support.tensors[1].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(query.tensors[0][:, 0], torch.tensor([0.5, 1.0]) / 3.5**0.5)
    assert query.tensors[1].tolist() == [1, 0]
    assert (table.class_names, table.num_classes, table.features) == (("x", "y"), 2, ["a", "b"])
    assert repr(table) == "Table(4 training rows, 2 to validate; 2 features, 2 classes)"


def test_files_and_data_frames_give_the_same(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    columns = Table(TRAIN, VAL, VAL, "kind").sample(0)
    files = Table(write(tmp_path / "t.csv", TRAIN), write(tmp_path / "v.csv", VAL), label="kind")
    frames = Table(pandas.DataFrame(TRAIN), pandas.DataFrame(VAL), label="kind")
    for table in (files, frames):
        for one, two in zip(table.sample(0)[:2], columns[:2], strict=True):
            assert all(map(torch.equal, one.tensors, two.tensors))


def test_rows_are_written_with_their_weights(tmp_path: Path):
    rows = {**TRAIN, "note": ["one, two", "", "ä", 'a "quote"']}
    source = write(tmp_path / "t.csv", rows)
    table = Table(source, VAL, label="kind", features=["a"])
    weights = torch.tensor([0.9, 0.5, 0.25, 0.75])
    assert table.write(tmp_path / "all.csv", weights) == 4
    assert table.write(tmp_path / "kept.csv", weights, above=0.5) == 2
    with (tmp_path / "kept.csv").open(newline="") as opened:
        kept = list(csv.DictReader(opened))
    assert [row["note"] for row in kept] == ["one, two", 'a "quote"']
    assert [row["weight"] for row in kept] == ["0.9", "0.75"]
    # What was written is a table again.
    assert len(Table(tmp_path / "kept.csv", VAL, label="kind", features=["a"]).rows["a"]) == 2
    assert "got (3,)" in refusal(lambda: table.write(tmp_path / "no.csv", weights[:3]))
    again = Table(tmp_path / "all.csv", VAL, label="kind", features=["a"])
    assert "a column 'weight' is in the" in refusal(lambda: again.write(tmp_path / "b", weights))


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ("none.csv", {}, "train must be a CSV file, got none.csv: no such file in /"),
        (3, {}, "train must be a CSV file, a DataFrame or a mapping of columns, got int"),
        ({"a": [1], "kind": []}, {}, "train must have columns of one length >= 1, got {'a': 1, "),
        (TRAIN, {"label": "c"}, "train must have the column 'c', got a, b, kind: say which it is"),
        (TRAIN, {"features": ["c"]}, "say which it is (features=...)"),
        (TRAIN, {"features": ["kind"]}, "features must be columns beside the label 'kind', got"),
        (
            {**TRAIN, "a": [1, 2, "n/a", 4]},
            {},
            "features must be finite numbers, got 'n/a' in row 3 of column 'a' of train: name",
        ),
        ({**TRAIN, "a": [1, None, 2, 3]}, {}, "got None in row 2 of column 'a' of train"),
        ({**TRAIN, "kind": list("xxxx")}, {}, "column 'kind' must hold two classes, got ('x',)"),
        (
            {**TRAIN, "kind": ["x", "", "x", "y"]},
            {},
            "labels must be given, got '' in row 2 of column 'kind' of train: fill it in, or",
        ),
        ({**TRAIN, "kind": [0, 1, 1, math.nan]}, {}, "got nan in row 4 of column 'kind' of train"),
        (
            {**TRAIN, "a": [1e200, -1e200, 1e200, 0]},
            {},
            "features must have a spread that is finite, got inf in column 'a' of train: scale",
        ),
        ({**TRAIN, "kind": list("xzxz")}, {}, "val must hold classes of the training rows, got y"),
    ],
)
def test_what_is_no_table_is_refused(train: Any, options: dict[str, Any], message: str):
    assert message in refusal(lambda: Table(train, VAL, **{"label": "kind", **options}))


@pytest.mark.parametrize("field", ["val", "test", "rows"])
def test_rows_that_are_not_finite_in_single_precision_are_refused(field: str):
    far = {**VAL, "a": [0.0, -1e300]}
    sets = {"val": VAL, "test": VAL, field: far}

    def scaled() -> torch.Tensor:
        table = Table(TRAIN, sets["val"], sets["test"], label="kind")
        return table.inputs(sets.get("rows", VAL))

    assert refusal(scaled).startswith(
        "features must be finite in float32 when they are scaled as those of train, got -1e+300 in "
        f"row 2 of column 'a' of {field}, where the standard deviation of train is "
    )


def test_ragged_files_are_refused(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("a,kind\n1,x\n2\n")
    assert f"must have 2 values as the first line of {file}, got 1 in row 2" in refusal(
        lambda: Table(file, VAL, label="kind")
    )
    file.write_text("a,a\n1,x\n")
    assert "a line of different column names and a row, got ['a', 'a']" in refusal(
        lambda: Table(file, VAL, label="kind")
    )


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_named(tmp_path: Path, separator: str):
    file = tmp_path / "t.csv"
    file.write_text(f"a{separator}kind\n1,5{separator}x\n")
    found = refusal(lambda: Table(file, VAL, label="kind"))
    assert "must have commas between its columns" in found
    assert f"pandas.read_csv({str(file)!r}, sep={separator!r})" in found


def test_names_are_equal_in_any_unicode_form(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text("gro\u0308\u00dfe,sorte\n1,caf\u00e9\n2,cafe\u0301\n3,tee\n", encoding="utf-8")
    val: Any = {"gr\u00f6\u00dfe": [1.0], "sorte": ["cafe\u0301"]}
    table = Table(file, val, label="sorte", features=["gr\u00f6\u00dfe"])
    assert table.class_names == ("caf\u00e9", "tee")
    assert table.sample(0).support.tensors[1].tolist() == [0, 0, 1]


def test_a_file_in_another_encoding_is_named(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_bytes("a,kind\n1,\xe4\n".encode("latin-1"))
    assert f"train must be a CSV file in UTF-8, got {file}: " in refusal(
        lambda: Table(file, VAL, label="kind")
    )


def test_columns_of_tensors_are_read_as_numbers():
    train: Any = {"a": torch.arange(4.0), "kind": torch.tensor([0, 1, 0, 1])}
    table = Table(train, {"a": [1], "kind": [torch.tensor(0)]}, label="kind")
    assert table.class_names == ("0", "1") and table.query.tensors[1].tolist() == [0]


def test_columns_whose_names_are_one_text_are_refused():
    rows: dict[str, list[Any]] = {
        "gr\u00f6\u00dfe": [1.0, 2.0],
        "gro\u0308\u00dfe": [3.0, 4.0],
        "y": ["a", "b"],
    }
    with pytest.raises(ValueError, match="columns of different names"):
        Table(rows, rows, label="y")
