"""The rows of a CSV file or a DataFrame, as a sampler of one task."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from metadist.checks.paths import absent
from metadist.checks.values import normal_form
from metadist.task import Batch
from metadist.tasks.fixed import OneTask

Columns = dict[str, list[Any]]
WEIGHT = "weight"
MISSING = ("", "nan", "<na>", "nat")
"""How a label that is missing reads, in a file or a data frame."""


class DataFrame(Protocol):
    """What is asked of a data frame, of pandas or another library."""

    columns: Any

    def __getitem__(self, column: Any, /) -> Any: ...


Rows = Mapping[str, Sequence[Any]] | DataFrame


class Table(OneTask):
    """A sampler of one task: the rows of a table, with numbers as features and a class each.

        table = Table("noisy.csv", "checked.csv", label="species")

    Features are (number - mean) / standard deviation of the training rows; a column without
    spread becomes 0. Classes are numbered in the order of their sorted names, `class_names`.

    Args:
        train: Training rows, whose labels may be wrong: a CSV file with a line of column names, a
            DataFrame, or a mapping of columns.
        val: Rows whose labels are right, which judge the fit.
        test: Further such rows for `solution_metrics`; None: it has no metrics.
        label: The column of the class.
        features: The columns of the features; None: all others, which must be numbers.

    Raises:
        ValueError: A column that is missing, a value that is no finite number, a label without
            training row; the row is named, counted from 1.
    """

    def __init__(
        self,
        train: str | Path | Rows,
        val: str | Path | Rows,
        test: str | Path | Rows | None = None,
        label: str = "label",
        features: Sequence[str] | None = None,
    ) -> None:
        self.label = label = normal_form(label)
        for name, source in (("train", train), ("val", val), ("test", test)):
            if source is None or isinstance(source, str | Path):  # what a config can hold
                setattr(self, name, source)
        self.rows = _columns(train, "train")
        names = [name for name in self.rows if name != label]
        self.features = names if features is None else list(map(normal_form, features))
        if not self.features or label in self.features:
            raise ValueError(
                f"features must be columns beside the label {label!r}, got {self.features}"
            )
        self.class_names = tuple(sorted(set(self._labels(self.rows, "train"))))
        if len(self.class_names) < 2:
            raise ValueError(f"column {label!r} must hold two classes, got {self.class_names}")
        numbers = self._numbers(self.rows, "train")
        self.mean = numbers.mean(0)
        spread = numbers.std(0, correction=0)
        if not (usable := spread.isfinite()).all():
            name = self.features[int((~usable).nonzero()[0])]
            raise ValueError(
                f"features must have a spread that is finite, got {float(spread[~usable][0])} in "
                f"column {name!r} of train: scale its numbers, or leave it out (features=[...])"
            )
        self.spread = torch.where(spread > 0, spread, torch.inf)
        others = [_columns(val, "val"), None if test is None else _columns(test, "test")]
        sets = [
            None if rows is None else self._batch(rows, name)
            for rows, name in zip([self.rows, *others], ("train", "val", "test"), strict=True)
        ]
        super().__init__(*sets)

    @property
    def num_classes(self) -> int:
        """How many classes the training rows have."""
        return len(self.class_names)

    def inputs(self, rows: str | Path | Rows) -> Tensor:
        """The features of other rows as those of training, float32 (rows, features)."""
        return self._scaled(_columns(rows, "rows"), "rows")

    def write(self, file: str | Path, weights: Tensor, above: float | None = None) -> int:
        """Write the training rows with a column `weight` behind them; returns how many.

        Args:
            file: The CSV file to write.
            weights: One for each training row, shape (rows,).
            above: Only rows of a larger weight are written; None: all.
        """
        num_rows = len(self.support.index)
        if weights.shape != (num_rows,):
            raise ValueError(
                f"weights must be one for each training row, shape ({num_rows},), got "
                f"{tuple(weights.shape)}"
            )
        if WEIGHT in self.rows:
            raise ValueError(f"a column {WEIGHT!r} is in the training rows: rename it")
        kept = 0
        with Path(file).open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow([*self.rows, WEIGHT])
            values = zip(*self.rows.values(), strict=True)
            for row, weight in zip(values, weights.tolist(), strict=True):
                if above is None or weight > above:
                    writer.writerow([*row, f"{weight:.6g}"])
                    kept += 1
        return kept

    def __repr__(self) -> str:
        return (
            f"Table({len(self.support.index)} training rows, {len(self.query.index)} to validate; "
            f"{len(self.features)} features, {self.num_classes} classes)"
        )

    def _batch(self, rows: Columns, field: str) -> Batch:
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = self._labels(rows, field)
        unknown = sorted(set(labels) - set(numbers))
        if unknown:
            raise ValueError(
                f"{field} must hold classes of the training rows, got {', '.join(unknown[:5])} in "
                f"column {self.label!r}: the classes are {', '.join(self.class_names[:10])}"
            )
        return Batch.of(
            self._scaled(rows, field), torch.tensor([numbers[label] for label in labels])
        )

    def _labels(self, rows: Columns, field: str) -> list[str]:
        _require(rows, self.label, field, "label")
        for row, value in _count(rows[self.label]):
            is_missing = value is None or str(value).strip().lower() in MISSING
            if is_missing:
                raise ValueError(
                    f"labels must be given, got {value!r} in row {row} of column {self.label!r} of "
                    f"{field}: fill it in, or leave the row out"
                )
        return [normal_form(str(value)) for value in rows[self.label]]

    def _scaled(self, rows: Columns, field: str) -> Tensor:
        numbers = self._numbers(rows, field)
        scaled = ((numbers - self.mean) / self.spread).float()
        for row, column in (~scaled.isfinite()).nonzero().tolist():
            raise ValueError(
                f"features must be finite in float32 when they are scaled as those of train, got "
                f"{float(numbers[row, column])} in row {row + 1} of column "
                f"{self.features[column]!r} of {field}, where the standard deviation of train is "
                f"{float(self.spread[column]):.3g}: mend the row, or leave the column out "
                "(features=[...])"
            )
        return scaled

    def _numbers(self, rows: Columns, field: str) -> Tensor:
        columns = []
        for name in self.features:
            _require(rows, name, field, "features")
            columns.append([_number(value, name, row, field) for row, value in _count(rows[name])])
        return torch.tensor(columns, dtype=torch.float64).T


def _count(values: list[Any]) -> enumerate[Any]:
    return enumerate(values, start=1)


def _number(value: Any, column: str, row: int, field: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"features must be finite numbers, got {value!r} in row {row} of column {column!r} of "
            f"{field}: name the columns that are (features=[...]), or fill it in"
        )
    return number


def _require(rows: Columns, column: str, field: str, option: str) -> None:
    if column not in rows:
        raise ValueError(
            f"{field} must have the column {column!r}, got {', '.join(rows)}: say which it is "
            f"({option}=...)"
        )


def _columns(rows: str | Path | Rows, field: str) -> Columns:
    """The columns of a table by name, all of one length."""
    if isinstance(rows, str | Path):
        return _read(Path(rows).expanduser(), field)
    if hasattr(rows, "columns"):
        pairs = [(name, rows[name]) for name in rows.columns]
    elif isinstance(rows, Mapping):
        pairs = list(rows.items())
    else:
        raise ValueError(
            f"{field} must be a CSV file, a DataFrame or a mapping of columns, got "
            f"{type(rows).__name__}"
        )
    columns: Columns = {}
    for name, values in pairs:
        known = normal_form(str(name))
        if known in columns:
            raise ValueError(
                f"{field} must have columns of different names, got {known!r} twice (as text, in "
                "Unicode's form NFC): rename one"
            )
        columns[known] = [_item(value) for value in values]
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise ValueError(f"{field} must have columns of one length >= 1, got {lengths}")
    return columns


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _read(file: Path, field: str) -> Columns:
    if not file.is_file():
        raise ValueError(f"{field} must be a CSV file, got {file}: {absent(file, 'file')}")
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            lines = csv.reader(opened)
            names = [normal_form(name) for name in next(lines, [])]
            rows = [row for row in lines if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{field} must be a CSV file in UTF-8, got {file}: {error}; save it as UTF-8"
        ) from error
    for separator in ";\t|":
        if len(names) == 1 and separator in names[0]:
            raise ValueError(
                f"{field} must have commas between its columns, got {names[0]!r:.80} as the first "
                f"line of {file}: pass pandas.read_csv({str(file)!r}, sep={separator!r})"
            )
    if len(set(names)) < len(names) or not rows:
        raise ValueError(
            f"{field} must have a line of different column names and a row, got {names} and "
            f"{len(rows)} rows in {file}"
        )
    for number, row in _count(rows):
        if len(row) != len(names):
            raise ValueError(
                f"each row of {field} must have {len(names)} values as the first line of {file}, "
                f"got {len(row)} in row {number}"
            )
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
