"""Signals: which of them stop a run, and what they leave."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from metadist.signals import PATIENCE, OneStop, signals_held
from tests.helpers import make_trainer, store_of


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of before, again after a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("sent", "died_of"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGHUP),
    ],
)
def test_a_signal_that_kills_does_so_after_a_checkpoint(tmp_path, sent, died_of):
    trainer = make_trainer(run_dir=tmp_path)

    def on_step(report: Any) -> bool:
        if report.step.version == 2:
            signal.raise_signal(sent)
        return True

    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        try:
            trainer.fit(9, on_step)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -died_of
    assert store_of(tmp_path).load()[0] == "step-00000002"


def test_only_the_first_of_several_signals_takes_effect():
    reached: list[str] = []

    def stopped() -> None:
        with OneStop() as stop:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                for _ in range(PATIENCE):
                    signal.raise_signal(signal.SIGINT)
                reached.append("the end")
                with pytest.raises(KeyboardInterrupt):
                    stop.check()
                with pytest.raises(KeyboardInterrupt):  # somebody is out of patience
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_that_does_not_stop_anything_is_called_each_time():
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    with OneStop() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            stop.check()
    assert calls == [signal.SIGTERM] * 3


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with OneStop() as stop, signals_held():
        signal.raise_signal(signal.SIGHUP)
        stop.check()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_held_signals_come_at_the_end(number):
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    reached: list[str] = []

    def hold() -> None:
        with signals_held():
            signal.raise_signal(number)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        hold()
    assert reached
