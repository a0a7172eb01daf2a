"""One problem on many shards is that problem on all data; here without processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metadist import LocalExecutor, StepReport, Trainer
from metadist.algorithm import Algorithm
from metadist.algorithms import (
    AID,
    BOME,
    DARTS,
    F2SA,
    FG2U,
    FSLA,
    IMAML,
    ITD,
    MEHA,
    MRBO,
    PZOBO,
    SABA,
    SAMA,
    SOBA,
    SUSTAIN,
    T1T2,
    VPBGD,
    AmIGO,
    LancBiO,
    NoLoopAID,
    Nystrom,
    Penalty,
    StocBiO,
    SubBiO,
)
from metadist.cluster import DataParallelExecutor, Workers
from metadist.cluster.data_parallel.data import cut
from metadist.cluster.data_parallel.exchange import Round
from metadist.cluster.data_parallel.layout import METRICS, Reply
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.optimizer import OuterOptimizer
from metadist.oracle import DERIVATIVES
from metadist.step_rules import SGD, Adam, AdamW
from metadist.task import Batch, Task
from metadist.tasks import FixedTasks
from metadist.trees import Params
from tests.algorithms.directions import NEW_TASKS
from tests.cluster.data_parallel.shards import (
    Cleaning,
    InProcess,
    LocalPool,
    PreciseText,
    Shared,
    Unequal,
    Whole,
    assert_same_state,
    bytes_of,
    cleaning,
    solve,
)
from tests.core.test_parts import Weighted
from tests.problems import DOUBLE, Quadratic, quadratic_task, smooth_task, true_hypergradient
from tests.tasks.text.test_text import NUM_CLASSES, sparse_task

ALL = {
    **{name: a for name, a in NEW_TASKS.items() if a.trains != "start"},
    "aid_warm": AID(3, 0.2, solver="fixed_point", adjoint_steps=3, warm_start=True),
    "amigo_cg": AmIGO(3, 0.2, solver="cg", adjoint_steps=2),
    "bome_value": BOME(3, 0.2, phi="value"),
    "f2sa_central": F2SA(3, 0.2, order=2),
    "itd_rates": ITD(3, inner_optimizer=SGD(0.2, momentum=0.5), learn_lr="per_tensor"),
    "saba_full": SABA(inner_lr=0.2, full_pass=True),
    "itd_adam": ITD(3, inner_optimizer=AdamW(0.05, eps=1e-3, clip_norm=0.5, carry=True)),
    "fg2u_adam": FG2U(3, inner_optimizer=Adam(0.05, eps=1e-3, clip_norm=0.5)),
    "sama_adam": SAMA(3, inner_optimizer=Adam(0.05, clip_norm=0.5, carry=True)),
}


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *(pytest.param(name, 4, id=f"{name}-batches") for name in ALL),
        *(pytest.param(name, None, id=name) for name in ("aid", "bome", "itd", "lancbio", "soba")),
        *(
            pytest.param(name, None, id=name, marks=pytest.mark.slow)
            for name in ALL
            if name not in ("aid", "bome", "itd", "lancbio", "soba")
        ),
    ],
)
def test_three_unequal_shards_are_one_process(name, batch_size):
    expected, reference = solve(LocalExecutor(), ALL[name], 2, batch_size=batch_size)
    found, reports = solve(InProcess(3), ALL[name], 2, batch_size=batch_size)
    assert_same_state(found, expected)
    for mine, theirs in zip(reports, reference, strict=True):
        metrics = mine.results[0].metrics
        for metric, value in theirs.results[0].metrics.items():
            assert metrics[metric] == pytest.approx(value, rel=1e-8, abs=1e-10), metric


@pytest.mark.parametrize("name", ["soba", "aid", "saba", "fg2u"])
def test_one_shard_gives_the_bytes_of_one_process(name):
    expected, _ = solve(LocalExecutor(), ALL[name], batch_size=4)
    assert bytes_of(solve(InProcess(1), ALL[name], batch_size=4)[0]) == bytes_of(expected)


def test_the_same_shards_give_the_same_bytes():
    first, second = (solve(InProcess(3), ALL["lancbio"], batch_size=4)[0] for _ in range(2))
    assert bytes_of(first) == bytes_of(second)


class Lasso(Cleaning):
    """With a non-smooth part, whose weight is learned."""

    def nonsmooth_loss(self, context, inner):
        return 0.05 * context["ridge"].exp() * inner["slope"].abs().sum()

    def prox_inner(self, context, inner, step_size):
        threshold = 0.05 * step_size * context["ridge"].exp()
        slope = inner["slope"]
        return {**inner, "slope": slope.sign() * (slope.abs() - threshold).relu()}


def test_a_prox_is_taken_once_and_here():
    algorithm = MEHA(inner_steps=2, inner_lr=0.2)
    expected, _ = solve(LocalExecutor(), algorithm, problem=Lasso(), batch_size=4)
    found, reports = solve(InProcess(3), algorithm, problem=Lasso(), batch_size=4)
    assert_same_state(found, expected)
    assert reports[-1].results[0].metrics["rounds"] == 3


T, Q = 4, 3
ROUNDS: dict[str, tuple[Algorithm, int]] = {
    "aid_cg": (AID(T, adjoint_steps=Q), T + 1 + Q + 1),
    "aid_fp": (AID(T, solver="fixed_point", adjoint_steps=Q, warm_start=True), T + Q + 1),
    "amigo": (AmIGO(T, adjoint_steps=Q), T + Q + 1),
    "imaml": (IMAML(T, adjoint_steps=Q), T + 1 + Q + 1),
    "itd": (ITD(T), T + 1 + T),
    "stocbio": (StocBiO(T, adjoint_steps=Q), T + 1 + Q + 1),
    "mrbo": (MRBO(adjoint_steps=Q), 1 + Q + 1),
    "soba": (SOBA(), 1),
    "saba": (SABA(), 1),
    "fsla": (FSLA(), 3),
    "noloopaid": (NoLoopAID(), 3),
    "subbio": (SubBiO(T), T + 3),
    "lancbio": (LancBiO(T, adjoint_steps=1), T + 1 + 1 + 1),
    "bome": (BOME(T), T + 1),
    "bome_value": (BOME(T, phi="value"), T + 1),
    "meha": (MEHA(), 2),
    "f2sa": (F2SA(T), T + 1),
    "f2sa_central": (F2SA(T, order=2), T + 1),
    "vpbgd": (VPBGD(T), T + 1),
    "penalty": (Penalty(T), 2 * T + 2),
    "pzobo": (PZOBO(T, num_directions=2), T + 1),
    "fg2u": (FG2U(T, num_directions=2), T + 1),
    "nystrom": (Nystrom(T, rank=Q), T + 2),
    "darts": (DARTS(T), T + 1 + 1),
    "sama": (SAMA(T), T + 1 + 1),
    "t1t2": (T1T2(T), T + 1 + 1),
}
"""Rounds per outer step from the second on, as docs/data_parallel.md has them."""


PAGE = Path(__file__).parents[3] / "docs" / "data_parallel.md"
ROWS = re.findall(
    r"^\| `(\w+)`.*? \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE
)


def test_the_page_has_all_of_them():
    assert sorted(name for name, *_ in ROWS) == sorted(ROUNDS)


@pytest.mark.parametrize(("name", "rounds", "sent", "answered"), ROWS, ids=[r[0] for r in ROWS])
def test_rounds_and_vectors_of_a_step_are_those_of_the_page(name, rounds, sent, answered):
    """Of the third step: the first begins from less, and a report before it has sent y."""
    algorithm, num_rounds = ROUNDS[name]
    executor = InProcess(2)
    _, reports = solve(executor, algorithm, 3, report_every=3)
    assert reports[2].results[0].metrics["rounds"] == num_rounds
    packages = [p[0] for p in executor.pool.packages]
    step = [p for p in packages if p.message.step == 2 and p.message.requests[0].draw]
    assert len(step) == num_rounds
    trees = [key[0] for package in step for key in package.shared]
    back = [role for p in step for r in p.message.requests for role in DERIVATIVES[r.method].gives]
    values = {"T": T, "Q": Q, "b": 2}
    assert eval(rounds, values) == num_rounds
    assert eval(sent, values) == (trees.count("x"), trees.count("y"))
    assert eval(answered, values) == (back.count("x"), back.count("y"))


def test_sustain_makes_a_chain_of_random_length():
    _, reports = solve(InProcess(2), SUSTAIN(adjoint_steps=6), 12)
    rounds = {report.results[0].metrics["rounds"] for report in reports}
    assert rounds <= set(range(2, 8)) and len(rounds) > 2


def test_averages_of_local_hypergradients_are_wrong_and_this_is_not():
    """Closed form: grad Phi = rho x + B' A^-1 (A^-1 (B x + c) - t), A the mean over examples."""
    problem, task = Quadratic(2, 4), quadratic_task(0, num_support=6, num_query=6, noise=0.7)
    algorithm = AID(100, 0.5, adjoint_steps=4)
    outer = problem.init_outer(torch.Generator().manual_seed(3))
    truth = true_hypergradient(problem, outer, task)
    shards = [cut(task, part, 3) for part in range(3)]
    local = task_hypergradients(problem, algorithm, outer, shards).total["x"] / 3
    assert float((local - truth).norm() / truth.norm()) > 0.05
    sgd = OuterOptimizer("sgd", lr=1.0)
    options: dict[str, Any] = {
        "problem": problem, "sampler": FixedTasks([task]), "optimizer": sgd
    }  # fmt: skip
    state, _ = solve(InProcess(3), algorithm, 1, **options)
    torch.testing.assert_close(outer["x"] - state.outer["x"], truth, rtol=1e-8, atol=1e-9)


# Old answers.


class Late(LocalPool):
    """Shard i answers with what it said i steps ago."""

    def __init__(self, num_shards: int) -> None:
        super().__init__(num_shards)
        self._said: dict[Any, list[list[Reply]]] = {}

    def ask(self, round: Round) -> list[Reply]:
        said = self._said.setdefault(round.place, [])
        said.append(super().ask(round))
        return [said[max(0, len(said) - 1 - part)][part] for part in range(len(said[0]))]


class LateExecutor(InProcess):
    make_pool = Late


@pytest.mark.parametrize(
    "algorithm",
    [
        SOBA(inner_lr=0.15, adjoint_lr=0.15),
        pytest.param(FSLA(inner_lr=0.15, adjoint_lr=0.15), marks=pytest.mark.slow),
        pytest.param(AmIGO(2, 0.15, adjoint_steps=2), marks=pytest.mark.slow),
        MEHA(inner_lr=0.15, y_lr=0.15, c=30.0, c_power=0.0),
        pytest.param(F2SA(5, 0.15, lam=1000.0), marks=pytest.mark.slow),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_answers_of_one_and_two_steps_ago_still_lead_to_the_solution(algorithm):
    task = quadratic_task(0, num_support=6, num_query=6)
    problem = Quadratic(2, 4, rho=1.0)
    rate = 0.5 if isinstance(algorithm, MEHA) else 0.03
    options: dict[str, Any] = {
        "problem": problem,
        "sampler": FixedTasks([task]),
        "optimizer": OuterOptimizer("sgd", lr=rate),
        "report_every": 1000,
    }
    state, _ = solve(LateExecutor(3, staleness=2), algorithm, 150, **options)
    start = problem.init_outer(torch.Generator().manual_seed(3))
    before, after = (
        float(true_hypergradient(problem, x, task).norm()) for x in (start, state.outer)
    )
    assert after < 0.05 * before


# What travels.


def test_a_shard_sees_the_rows_of_its_own_examples_and_gives_no_others():
    executor = InProcess(3)
    found, _ = solve(executor, SOBA(), batch_size=None)
    sampler = Unequal()
    owned = [sampler.shard(0, part, 3).support.index for part in range(3)]
    for packages, replies in zip(executor.pool.packages, executor.pool.replies, strict=True):
        for part, (package, reply) in enumerate(zip(packages, replies, strict=True)):
            for key, array in package.shared.items():
                # ridge alone; slope and offset
                assert len(array) == (1 if key[0] == "x" else 4)
                assert len(package.own[key]) == (len(owned[part]) if key[0] == "x" else 0)
            if package.message.requests[0].method != METRICS:
                # grad_y g; J v, H v; grad_x f, grad_y f
                assert len(reply.flat) == 3 * 4 + 2 * (1 + len(owned[part]))
    # Each row went to its owner and came from there: the result is that of sending all rows.
    everywhere = InProcess(3)
    expected, _ = solve(everywhere, SOBA(), problem=Shared())
    assert_same_state(found, expected)
    assert executor.pool.bytes_sent < everywhere.pool.bytes_sent
    assert executor.pool.bytes_received < everywhere.pool.bytes_received


def test_the_rows_sent_are_those_of_the_owner():
    executor = InProcess(2)
    solve(executor, SOBA(), 1, sampler=Whole())
    first = executor.pool.packages[0]
    rows = [a for package in first for key, a in package.own.items() if key[0] == "x"]
    initial = Cleaning().init_outer(torch.Generator().manual_seed(3))["weights"]
    assert torch.equal(torch.cat([torch.tensor(row) for row in rows]), initial)


def test_nothing_is_sent_twice_and_nothing_kept_for_longer_than_needed():
    executor = InProcess(2)
    _, reports = solve(executor, FSLA(), 4, report_every=1)
    asked = [p[0] for p in executor.pool.packages if p[0].message.requests[0].method != METRICS]
    # x and the moved y, then v; the point before and its v are there already.
    assert [len(package.shared) for package in asked[-3:]] == [1, 1, 1]
    sent = [key for package in asked for key in package.shared]
    assert len(sent) == len(set(sent))
    # x, y, v, and x, y, v before
    assert all(len(slot.held) <= 8 for slot in executor.pool._slots)
    metrics = reports[-1].results[0].metrics
    # x (12 numbers in all shards' parts and ridge twice), y, v to 2 shards, 8 bytes each
    assert metrics["bytes_sent"] == 8 * (11 + 2 + 2 * 4 + 2 * 4)


def test_iterates_of_itd_are_not_sent_again_on_the_way_back():
    executor = InProcess(2)
    solve(executor, ITD(T), 1, report_every=9)
    asked = [p[0] for p in executor.pool.packages if p[0].message.requests[0].method != METRICS]
    back = asked[T + 1 :]
    assert len(back) == T and all(len(package.shared) == 1 for package in back)


# Resuming.


@pytest.mark.parametrize("name", ["lancbio", "saba", "fsla", "aid_warm"])
def test_resuming_gives_the_same_bytes_and_with_other_shards_the_same_to_rounding(name):
    algorithm = ALL[name]
    whole, _ = solve(InProcess(3), algorithm, 4, batch_size=4)
    half, _ = solve(InProcess(3), algorithm, 2, batch_size=4)
    again, _ = solve(InProcess(3), algorithm, 4, state=half, batch_size=4)
    assert bytes_of(again) == bytes_of(whole)
    for executor in (InProcess(2), LocalExecutor()):
        other, _ = solve(executor, algorithm, 4, state=half, batch_size=4)
        assert_same_state(other, whole)


def test_a_trainer_resumes_from_its_checkpoint(tmp_path):
    whole = cleaning(SOBA(), InProcess(3))
    whole.fit(4)
    cleaning(SOBA(), InProcess(3), run_dir=tmp_path / "run").fit(2)
    again = cleaning(SOBA(), InProcess(3), run_dir=tmp_path / "run")
    again.restore()
    again.fit(4)
    for name, leaf in whole.outer.items():
        assert torch.equal(again.outer[name], leaf)
    for name, leaf in whole.inner(0).items():
        assert torch.equal(again.inner(0)[name], leaf)


def test_a_hypergradient_that_is_not_finite_is_dropped():
    state, reports = solve(InProcess(2), SOBA(inner_lr=1e200, adjoint_lr=1e200), 6)
    results = [report.results[0] for report in reports]
    assert results[-1].dropped == (0,) and results[-1].num_tasks == 0
    assert all(bool(leaf.isfinite().all()) for leaf in state.outer.values())


class Partial(Cleaning):
    """Its context is a part of x; the rest is where y starts."""

    def init_outer(self, generator):
        start = torch.ones(3, dtype=DOUBLE)
        return {"start": start, **super().init_outer(generator)}

    def encode(self, outer, task):
        return {name: outer[name] for name in ("weights", "ridge")}

    def init_inner(self, outer, task):
        return {"slope": outer["start"], "offset": torch.ones(1, dtype=DOUBLE)}


def test_the_context_may_be_a_part_of_x():
    expected, theirs = solve(LocalExecutor(), AID(3, 0.2), problem=Partial())
    found, mine = solve(InProcess(3), AID(3, 0.2), problem=Partial())
    assert_same_state(found, expected)
    metric = "query_loss_before"
    assert mine[-1].results[0].metrics[metric] == pytest.approx(
        theirs[-1].results[0].metrics[metric], rel=1e-10
    )


# Refusals, before any work.


class Drifting(Cleaning):
    def init_inner(self, outer, task):
        start = super().init_inner(outer, task)
        return {**start, "offset": task.support.tensors[1].mean().reshape(1)}


class Misnamed(Cleaning):
    def per_example(self, outer):
        return {"wieghts"}


class Ragged(Unequal):
    def shard(self, index, part, num_parts):
        shard = super().shard(index, part, num_parts)
        if part:
            return shard
        support = Batch(tuple(t.float() for t in shard.support.tensors), shard.support.index)
        return shard._replace(support=support)


class Doubled(Unequal):
    def shard(self, index, part, num_parts):
        return self.sample(index)


class Dirty(Unequal):
    def shard(self, index, part, num_parts):
        shard = super().shard(index, part, num_parts)
        if part == 1:
            shard.query.tensors[0][0] = torch.nan
        return shard


class Summed(Cleaning):
    def inner_loss(self, context, inner, batch):
        return super().inner_loss(context, inner, batch) * len(batch.index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"problem": Summed()}, r"in shard 0 inner_loss must be a mean over examples"),
        ({"problem": Drifting()}, r"init_inner must not depend on data, got another start in sh"),
        ({"problem": Misnamed()}, r"per_example must name outer variables .*, got wieghts"),
        ({"problem": Cleaning(12)}, r"per_example variable weights must have a row for each of 11"),
        ({"sampler": Ragged()}, r"shards must have examples of one form, got .*float32"),
        ({"sampler": Doubled()}, r"shards must hold every position of the support set once"),
        ({"sampler": Dirty()}, r"in shard 1 the query set must be finite, got NaN or Inf in its"),
        (
            {"sampler": Whole(2, 7)},
            r"shard 0 must hold at least one support example, got none: num_",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_cut_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        solve(InProcess(3), SOBA(), **options)


class SortedArticles(FixedTasks):
    """Sparse rows, sorted by class, so that a shard lacks some."""

    num_classes = NUM_CLASSES

    def __init__(self) -> None:
        task = sparse_task()[0]
        support, query = (
            Batch.named(columns=columns[order], values=values[order], targets=labels[order])
            for columns, values, labels in (task.support.tensors, task.query.tensors)
            for order in [labels.argsort()]
        )
        super().__init__([Task(support, query, 0)])


def test_a_class_missing_from_a_shard_is_refused_unless_it_may_be():
    given: dict[str, Any] = {"problem": PreciseText(), "sampler": SortedArticles()}
    with pytest.raises(ValueError, match=r"the support set of every shard must hold all \d class"):
        solve(InProcess(3), SOBA(), **given)
    allowed, _ = solve(InProcess(3, allow_missing_classes=True), SOBA(), **given)
    assert_same_state(allowed, solve(LocalExecutor(), SOBA(), **given)[0])


def test_algorithms_that_cannot_be_asked_like_this_are_refused():
    with pytest.raises(ValueError, match=r"algorithm must ask for derivatives .* engine='adjoint'"):
        solve(InProcess(2), ITD(engine="unrolled"))
    with pytest.raises(ValueError, match=r"algorithm must ask for derivatives .* use engine="):
        solve(InProcess(2), ITD(engine="higher"))


@pytest.mark.parametrize(
    "algorithm",
    [AID(), LancBiO(), MRBO(), SABA(), AmIGO(solver="cg"), BOME()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_staleness_is_for_those_that_tolerate_it(algorithm):
    with pytest.raises(ValueError, match=rf"staleness must be 0 with {type(algorithm).__name__}, "):
        solve(InProcess(2, staleness=1), algorithm)


@pytest.mark.parametrize("algorithm", [SOBA(), FSLA(), MEHA(), F2SA(), AmIGO()])
def test_staleness_is_accepted(algorithm):
    assert solve(InProcess(2, staleness=1), algorithm, 1)[0].version == 1


@pytest.mark.parametrize(
    "options", [{"keep_state": False}, {"meta_batch_size": 2}], ids=["new tasks", "many tasks"]
)
def test_many_tasks_are_refused(options):
    trainer = cleaning(SOBA(), InProcess(2), sampler=Tasks(), **options)
    with pytest.raises(ValueError, match=r"keep_state must be True and meta_batch_size 1 .*, got"):
        trainer.fit(1)


class Tasks:
    def sample(self, index: int) -> Task:
        return Whole().sample(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"workers": Workers(num_workers=2, min_workers=1)},
            "min_workers must be None with DataParallelExecutor, .* got 1: leave it out",
        ),
        ({"workers": 2}, r"workers must be a Workers, such as Workers\(num_workers=4\), got 2"),
        ({"failures": 2}, r"failures must be a Failures, such as Failures\(max_losses=3\), got 2"),
        ({"staleness": -1}, "staleness must be >= 0, got -1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataParallelExecutor(**options)


def test_it_must_be_started():
    with pytest.raises(RuntimeError, match=r"the executor must be started with start"):
        DataParallelExecutor().state()


class Judged(Weighted):
    """Rows of other examples enter no loss."""

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.errors(inner, batch).mean()


def test_shards_report_on_the_examples_that_one_process_reports_on():
    def reported(**options: Any) -> list[dict[str, float]]:
        reports: list[dict[str, float]] = []

        def keep(report: StepReport) -> bool:
            reports.append(dict(report.results[0].metrics))
            return True

        trainer = Trainer(
            Judged(40),
            FixedTasks([smooth_task(0, 40, 30)]),
            SOBA(),
            outer_optimizer=OuterOptimizer("sgd", lr=0.1),
            compute=Compute(batch_size=4, report_examples=10, device="cpu"),
            log_every=1,
            quiet=True,
            **options,
        )
        trainer.fit(2, keep)
        return reports

    for local, shards in zip(reported(), reported(executor=InProcess(3)), strict=True):
        for name in ("query_loss", "support_loss", "query_near", "query_loss_before"):
            assert shards[name] == pytest.approx(local[name], rel=1e-9)
