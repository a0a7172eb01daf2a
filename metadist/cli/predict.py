"""`metadist predict`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from metadist.cli.parsing import Parser
from metadist.cli.runs import add_adaptation, output_file, run_parser

if TYPE_CHECKING:
    from metadist.cli.images import Labelled


def parser() -> Parser:
    """Options of `metadist predict`."""
    parser = run_parser("predict", "Adapt to images of classes, and say the class of others.")
    parser.add_argument(
        "--support",
        type=str | None,
        metavar="FOLDER",
        help="A folder of images for each class; by default the run's own data, for a run on one "
        "task.",
    )
    parser.add_argument(
        "--query",
        type=str,
        required=True,
        metavar="FOLDER",
        help="The images to predict; where they are in folders that are called like the classes, "
        "the accuracy is printed too.",
    )
    add_adaptation(parser)
    parser.add_argument("--output", type=str | None, help="A CSV file for the predictions.")
    return parser


def run(config: Namespace) -> int:
    """Run `metadist predict`."""
    from metadist.cli import train
    from metadist.cli.images import labelled, support_of
    from metadist.cli.trained import load

    if config.output:
        output_file("output", config.output)
    query = labelled(Path(config.query), "query")  # first, as it is read in no time
    trained = load(train.saved_config(config.run_dir), config)
    support = support_of(trained, config.support)
    logits = trained.predict(support.task, support.reader.read_images(query.files))
    shares, numbers = logits.softmax(1).max(1)
    predicted = [support.classes[number] for number in numbers.tolist()]
    rows = list(zip(query.files, predicted, shares.tolist(), strict=True))
    print(f"{config.run_dir} {trained.checkpoint}, {trained.version} outer steps")
    for file, name, share in rows:
        print(f"{file}  {name}  {share:.3f}")
    if config.output:
        with open(config.output, "w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "class", "probability"])
            writer.writerows((file, name, f"{share:.6f}") for file, name, share in rows)
    _print_accuracy(query, predicted, support.classes)
    return 0


def _print_accuracy(query: Labelled, predicted: list[str], classes: list[str]) -> None:
    if not query.labels:
        return
    others = sorted(set(query.labels) - set(classes))
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"no accuracy: folders of --query that are no class: {', '.join(others[:5])}{more}")
        return
    hits = sum(a == b for a, b in zip(query.labels, predicted, strict=True))
    print(f"accuracy {hits / len(predicted):.4f} ({hits} of {len(predicted)})")
