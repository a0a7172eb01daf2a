"""A CSV file with wrong labels: learn a weight for each row, and write the rows to keep."""

import csv
import random
from pathlib import Path

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import LancBiO
from metadist.tasks import HyperCleaning, LinearClassifier, Table


def write_noisy(folder: Path) -> int:
    """Write noisy.csv, 300 rows of which some labels are wrong, and checked.csv, 60 right ones."""
    draw = random.Random(0)
    num_wrong = 0
    for name, num_rows, share in (("noisy", 300, 0.3), ("checked", 60, 0.0)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["length", "width", "species"])
            for number in range(num_rows):
                species = number % 2
                is_wrong = draw.random() < share
                num_wrong += is_wrong
                label = ("iris", "lily")[species != is_wrong]
                rows.writerow([draw.gauss(2 * species, 1), draw.gauss(-2 * species, 1), label])
    return num_wrong


def main(folder: str = ".", num_steps: int = 100) -> tuple[int, int]:
    """(how many labels are wrong, how many rows were left out); seconds on one core."""
    num_wrong = write_noisy(Path(folder))
    table = Table(f"{folder}/noisy.csv", f"{folder}/checked.csv", label="species")
    problem = HyperCleaning(num_examples=300, model=LinearClassifier(2, 2))
    algorithm = LancBiO(inner_steps=5, inner_lr=0.5)
    trainer = Trainer(problem, table, algorithm, outer_optimizer=OuterOptimizer("adam", lr=0.1))
    trainer.fit(num_steps)
    weights = trainer.outer["logits"].sigmoid()  # one for each row, in 0 .. 1
    num_kept = table.write(f"{folder}/cleaned.csv", weights, above=0.5)
    print(f"{num_wrong} of 300 labels are wrong; {300 - num_kept} rows are left out of cleaned.csv")
    return num_wrong, 300 - num_kept


if __name__ == "__main__":
    main()
