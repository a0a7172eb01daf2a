"""What is alive at once: first-order methods keep no graph from one inner step to the next.

Every graph of a step of `Smooth` on 500 examples holds vectors of 500 numbers; y has 5.
"""

import pytest

from metadist.algorithms.aid import AID
from metadist.algorithms.bamm import BAMM
from metadist.algorithms.bda import BDA
from metadist.algorithms.bome import BOME
from metadist.algorithms.bvfsm import BVFSM
from metadist.algorithms.darts import DARTS
from metadist.algorithms.f2sa import F2SA
from metadist.algorithms.fg2u import FG2U
from metadist.algorithms.free_pbgd import FreePBGD
from metadist.algorithms.iaptt import IAPTT
from metadist.algorithms.itd import ITD
from metadist.algorithms.meha import MEHA
from metadist.algorithms.penalty import Penalty
from metadist.algorithms.pzobo import PZOBO
from metadist.algorithms.sama import SAMA
from metadist.algorithms.srba import SRBA
from metadist.algorithms.t1t2 import T1T2
from metadist.algorithms.ufom import UFOM
from metadist.algorithms.vpbgd import VPBGD
from metadist.memory import LiveMemory
from metadist.step_rules import Adam
from metadist.trees import num_elements
from tests.problems import Smooth, generator, oracle_of, smooth_task

EXAMPLES = 500
FEW, MANY = 4, 16


class PeakMemory(LiveMemory):
    """The most bytes that tensors made within the block held at one time."""

    peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes())
        return result


def bytes_per_step(make, eager, graph_budget=0):
    """How much the peak of live tensors grows with each inner step of one estimate."""
    problem, task = Smooth(), smooth_task(0, num_support=EXAMPLES, num_query=EXAMPLES)
    outer = problem.init_outer(generator(0))
    peaks = []
    for num_steps in (FEW, MANY):
        oracle, context, start = oracle_of(
            problem, outer, task, eager=eager, graph_budget=graph_budget
        )
        algorithm = make(num_steps)
        with PeakMemory() as memory:
            algorithm.estimate(oracle, context, algorithm.init(oracle, context, start))
        peaks.append(memory.peak_bytes)
    assert peaks[0] > 8 * EXAMPLES, "the measure sees the graph of a step"
    return (peaks[1] - peaks[0]) / (MANY - FEW)


CONSTANT = {
    "AID": lambda steps: AID(steps, 0.01),
    "BOME": lambda steps: BOME(steps, 0.01),
    "BOME, rounds": lambda steps: BOME(2, 0.01, rounds=steps),
    "MEHA": lambda steps: MEHA(steps, 0.01),
    "F2SA": lambda steps: F2SA(steps, 0.01),
    "F2SA-2": lambda steps: F2SA(steps, order=2, inner_optimizer=Adam(0.01)),
    "BVFSM": lambda steps: BVFSM(steps, 0.01, y_steps=steps),
    "PBGD-Free": lambda steps: FreePBGD(steps, 0.01),
    "BAMM": lambda steps: BAMM(steps, 0.01),
    "SRBA": lambda steps: SRBA(steps, 0.01),
    "V-PBGD": lambda steps: VPBGD(steps, 0.01),
    "penalty": lambda steps: Penalty(steps, 0.01),
    "T1-T2": lambda steps: T1T2(steps, 0.01),
    "DARTS": lambda steps: DARTS(steps, 0.01),
    "SAMA": lambda steps: SAMA(steps, inner_optimizer=Adam(0.01)),
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", CONSTANT)
def test_memory_does_not_grow_with_inner_steps(name, eager):
    assert bytes_per_step(CONSTANT[name], eager) <= 0


Y_BYTES = 8 * num_elements(Smooth().init_inner(Smooth().init_outer(generator(0)), smooth_task(0)))


@pytest.mark.parametrize("graph_budget", [0, 8 * 6 * EXAMPLES])
@pytest.mark.parametrize("eager", [False, True])
def test_the_adjoint_of_itd_keeps_one_inner_variable_per_step(eager, graph_budget):
    growth = bytes_per_step(lambda steps: ITD(steps, 0.01), eager, graph_budget)
    assert 0 < growth <= 2 * Y_BYTES


@pytest.mark.parametrize("method", [BDA, IAPTT])
def test_other_adjoints_do_so_as_well(method):
    assert 0 < bytes_per_step(lambda steps: method(steps, 0.01), eager=True) <= 3 * Y_BYTES


@pytest.mark.parametrize("engine", ["unrolled", "higher"])
def test_other_engines_of_itd_keep_one_graph_per_step(engine):
    growth = bytes_per_step(lambda steps: ITD(steps, 0.01, engine=engine), eager=False)
    assert growth >= 8 * EXAMPLES


@pytest.mark.parametrize("eager", [False, True])
def test_forward_mode_and_differences_keep_nothing_per_step(eager):
    """Unlike ITD, whose hypergradient they estimate; UFOM as well, where it recomputes."""
    assert bytes_per_step(lambda steps: FG2U(steps, 0.01, num_directions=2), eager) <= 0
    assert bytes_per_step(lambda steps: PZOBO(steps, 0.01, num_directions=2), eager) <= 0
    again = bytes_per_step(
        lambda steps: UFOM(steps, 0.01, exact_probability=1.0, recompute=True), eager
    )
    assert (
        again
        <= 0
        < bytes_per_step(lambda steps: UFOM(steps, 0.01, exact_probability=1.0), eager)
        <= 2 * Y_BYTES
    )
