"""A user's own script: `python train_mine.py RUN_DIR local|ray`."""

import sys

import torch
from my_tasks import MySampler  # type: ignore[import-not-found]

import metadist
from metadist.algorithms import ITD
from metadist.cluster import RayExecutor, Workers
from metadist.models import MLP
from metadist.tasks import FewShotProblem

if __name__ == "__main__":
    run_dir, where = sys.argv[1:]
    torch.manual_seed(0)
    trainer = metadist.Trainer(
        FewShotProblem(MLP(in_features=2, out_features=3, hidden=(8,))),
        MySampler(n_way=3),
        ITD(inner_steps=2),
        meta_batch_size=8,
        tasks_per_lease=2,
        executor=RayExecutor(Workers(num_workers=2))
        if where == "ray"
        else metadist.LocalExecutor(),
        run_dir=run_dir,
    )
    trainer.fit(4)
