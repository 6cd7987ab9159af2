"""The gate that keeps requests and updates apart, with real threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.adapters.trainer_side import wait_until

from weightcast.adapters.transformers.gate import Gate
from weightcast.sync.errors import DeadlineExceeded, EngineError


class Request:
    """A request that generates tokens until it is told to end, in a thread of its own."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.num_tokens = 0
        self.outcome = ""
        self.finish = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.gate.admitted(10):
                while not self.finish.wait(0.001):
                    if not self.gate.between_tokens():
                        self.outcome = "aborted"
                        return
                    self.num_tokens += 1
                self.outcome = "finished"
        except EngineError:
            self.outcome = "failed"


@contextmanager
def running(gate: Gate) -> Iterator[Request]:
    request = Request(gate)
    wait_until(lambda: request.num_tokens > 0 or not request.thread.is_alive(), "a first token", 10)
    yield request
    request.finish.set()
    gate.open("test")
    request.thread.join(10)
    assert not request.thread.is_alive()


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_abort_ends_running_requests() -> None:
    gate = Gate()
    with running(gate) as request:
        gate.close("test", "abort", 10)
        assert gate.num_running == 0
    assert request.outcome == "aborted"


def test_wait_lets_running_requests_finish() -> None:
    gate = Gate()
    with running(gate) as request:
        closing = in_thread(lambda: gate.close("test", "wait", 10))
        before = request.num_tokens
        wait_until(lambda: request.num_tokens > before + 2, "more tokens while closing", 10)
        assert closing.is_alive()
        request.finish.set()
        closing.join(10)
        assert gate.num_running == 0
    assert request.outcome == "finished"


def test_keep_freezes_running_requests_until_opened() -> None:
    gate = Gate()
    with running(gate) as request:
        gate.close("test", "keep", 10)
        frozen_at = request.num_tokens
        assert not request.finish.wait(0.05)
        assert (request.num_tokens, gate.num_running) == (frozen_at, 1)
        gate.open("test")
        wait_until(lambda: request.num_tokens > frozen_at, "tokens after opening", 10)
    assert request.outcome == "finished"


def test_a_pause_that_takes_too_long_is_taken_back() -> None:
    gate = Gate()
    with running(gate) as request:
        with pytest.raises(DeadlineExceeded, match=r"1 requests were still running 0\.05 s after a pause"):
            gate.close("test", "wait", 0.05)
        assert not gate.is_paused
        before = request.num_tokens
        wait_until(lambda: request.num_tokens > before, "tokens after the failed pause", 10)


def test_nobody_enters_a_closed_gate() -> None:
    gate = Gate()
    gate.close("an update", "wait", 1)
    with pytest.raises(DeadlineExceeded, match=r"paused by an update for 0\.02 s"), gate.admitted(0.02):
        pass
    gate.open("an update")
    with gate.admitted(1):
        assert gate.num_running == 1


def test_the_gate_opens_when_its_last_owner_lets_go() -> None:
    gate = Gate()
    gate.close("an operator", "abort", 1)
    gate.close("an update", "wait", 1)
    gate.open("an update")
    assert gate.is_paused
    gate.open("an operator")
    assert not gate.is_paused


def test_a_broken_gate_fails_frozen_and_new_requests() -> None:
    gate = Gate()
    with running(gate) as request:
        gate.close("test", "keep", 10)
        gate.break_down("its weights are undefined")
        request.thread.join(10)
    assert request.outcome == "failed"
    with pytest.raises(EngineError, match="its weights are undefined"), gate.admitted(1):
        pass
