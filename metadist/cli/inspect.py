"""`metadist inspect`."""

from __future__ import annotations

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from metadist.cli.parsing import Parser
from metadist.cli.runs import add_checkpoint, run_parser


def parser() -> Parser:
    """Options of `metadist inspect`."""
    parser = run_parser("inspect", "Show the checkpoints of a run and what one of them holds.")
    add_checkpoint(parser)
    return parser


def run(config: Namespace) -> int:
    """Run `metadist inspect`; exit code 1 if a checkpoint is damaged."""
    from metadist.run.checkpoint import CheckpointError, CheckpointStore
    from metadist.run.files import CHECKPOINTS
    from metadist.run.settings import as_text
    from metadist.run.storage import Folder
    from metadist.run.text import shown

    store = CheckpointStore((Folder(config.run_dir) / CHECKPOINTS).uri)
    if not store.names():
        store = CheckpointStore(config.run_dir)
    if not store.names():
        raise CheckpointError(f"run_dir must be a folder with checkpoints, got {config.run_dir!r}")
    damaged = 0
    table = Table("checkpoint", "score", "state", title=shown(store.uri))
    for name in store.names():
        try:
            _, checkpoint = store.load(name)
        except CheckpointError as error:
            damaged += 1
            table.add_row(shown(name), "", shown(error))
        else:
            score = "" if checkpoint.score is None else f"{checkpoint.score:.4f}"
            table.add_row(name, score, "good" + (", best" if name == store.best() else ""))
    console = Console(soft_wrap=True)
    console.print(table)
    name, checkpoint = store.load(config.checkpoint)
    state = checkpoint.state
    console.print(f"{name}: outer step {state.version}, next lease {state.applied_below}")
    for key, value in checkpoint.info.items():
        console.print(shown(f"  {key}: {as_text(value)}"))
    tensors = Table("tensor", "shape", "dtype", "numbers")
    for group, leaves in (("outer", state.outer), ("optimizer", state.optimizer)):
        for key, leaf in leaves.items():
            dtype = str(leaf.dtype).removeprefix("torch.")
            tensors.add_row(
                shown(f"{group}.{key}"), str(tuple(leaf.shape)), dtype, f"{leaf.numel():,}"
            )
    console.print(tensors)
    return 1 if damaged else 0
