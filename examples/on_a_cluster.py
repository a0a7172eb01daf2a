"""The few-shot example on Ray: on this machine, or on the cluster that --address names."""

import argparse

import torch

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD
from metadist.cluster import BSP, RayExecutor, Workers
from metadist.models import Conv4
from metadist.tasks import FewShotProblem, Glyphs


def main(
    num_steps: int = 300,
    num_test_tasks: int = 600,
    num_workers: int = 2,
    address: str | None = None,
) -> float:
    """The accuracy on scripts that training never saw."""
    torch.manual_seed(0)  # for the initial weights
    problem = FewShotProblem(Conv4(width=32), adapt="head")
    algorithm = ITD(inner_steps=5, inner_lr=0.4)
    executor = RayExecutor(
        workers=Workers(num_workers=num_workers, start_timeout_s=600.0),
        policy=BSP(),  # any number of workers gives the same bytes; SSP, ASP, Buffered do not wait
        address=address,  # None: a Ray of our own, which ends with the program
    )
    trainer = Trainer(
        problem,
        Glyphs(),
        algorithm,
        outer_optimizer=OuterOptimizer("adam", lr=2e-3),
        meta_batch_size=8,
        executor=executor,
        eval_inner_steps=20,
    )
    trainer.fit(num_steps)
    test = trainer.test(Glyphs(split="test"), num_test_tasks)  # on the workers too
    accuracy = test.metrics["query_accuracy"]
    print(f"accuracy on unseen scripts: {accuracy}")
    return accuracy.mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help='"auto": the Ray that runs on this machine')
    parser.add_argument("--num_workers", type=int, default=2)
    main(**vars(parser.parse_args()))
