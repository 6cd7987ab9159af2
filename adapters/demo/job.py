"""The main job end to end: a trainer keeps an engine in step, and the result is proved.

`run_demo` reads as the job does: prepare the model, start the engine, ask it, train while it takes every version,
ask it again, start a fresh engine on the exported folder, ask that, compare. Whatever goes wrong, the processes it
started are ended on the way out.

    with LiveTable() as table:
        result = run_demo(DemoRequest(engine="transformers", steps=6), table)
    result.proof.faults()       # () when the live engine holds exactly the trainer's weights
"""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from weightcast.adapters.demo.commands import (
    HOST,
    Command,
    TrainerSettings,
    driver_command,
    engine_command,
    trainer_command,
)
from weightcast.adapters.demo.engine_client import EngineClient
from weightcast.adapters.demo.events import EventReader, Phase, VersionRow
from weightcast.adapters.demo.inputs import DemoRequest
from weightcast.adapters.demo.live import LiveTable
from weightcast.adapters.demo.processes import Child, Processes, find_free_port
from weightcast.adapters.demo.proof import Answer, Comparison, Proof, Question
from weightcast.adapters.demo.report import Report, render_report
from weightcast.adapters.demo.setup import Setup, prepare, read_software
from weightcast.sync.errors import DeadlineExceeded, EngineError

QUESTIONS = (
    Question("import "),
    Question("def main(argv=None):"),
    Question("Water boils at a temperature of"),
    Question("import ", seed=1),
    Question("Water boils at a temperature of", seed=2),
)
ENGINE_START_TIMEOUT_S = 300.0
QUIET_TIMEOUT_S = 600.0  # without a single event from trainer or engine
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Where the report and the exported folder are, and what was proved."""

    report: Path
    export: Path
    proof: Proof


@dataclass
class Watch:
    """Collects the events of a run while its processes go on."""

    processes: Processes
    table: LiveTable
    reader: EventReader
    rows: list[VersionRow] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)

    def look(self, *, may_end: Child | None = None) -> int:
        """Take in new events; how many there were.

        Raises EngineError when an engine refused a version, PeerLost when a process ended that should not have.
        """
        events = self.reader.read_new()
        for event in events:
            if isinstance(event, VersionRow):
                self.rows.append(event)
                self.table.add(event)
            else:
                self.phases.append(event)
                if event.reason:
                    raise EngineError(f"{event.process} {event.name} version {event.version}: {event.reason}")
        self.processes.check(may_end=may_end)
        return len(events)

    def wait_until(self, ready: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Look on until `ready()`. Raises DeadlineExceeded after `timeout_s` in which nothing happened."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if self.look():
                deadline_s = time.monotonic() + timeout_s
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"{what} was not ready within {timeout_s:.0f} s; its log is in the logs folder")
            time.sleep(POLL_S)


def run_demo(request: DemoRequest, table: LiveTable) -> DemoResult:
    """Run the whole job. Only the main thread may call it.

    Raises ConfigError on wrong input, before anything is started; PeerLost, EngineError or DeadlineExceeded when a
    process ends, refuses or hangs. A proof that fails is no exception: it is in the result and in the report.
    """
    table.say("preparing the model")
    setup = prepare(request)
    with ending_on_sigterm(), Processes(setup.logs) as processes:
        watch = Watch(processes, table, EventReader(setup.events))
        before, live = train_with_engine(setup, watch)
        table.say("starting a fresh engine on the exported folder")
        fresh_child, client = start_engine(setup, watch, "engine-fresh", setup.export)
        fresh = ask(client, setup)
        processes.stop(fresh_child)
    answers = zip(QUESTIONS, before, live, fresh, strict=True)
    proof = Proof(tuple(Comparison(*each) for each in answers), last_version=request.steps)
    report = Report(tuple(watch.rows), tuple(watch.phases), proof, setup.facts(), read_software())
    setup.report.write_text(render_report(report), encoding="utf-8")
    return DemoResult(setup.report, setup.export, proof)


def train_with_engine(setup: Setup, watch: Watch) -> tuple[list[Answer], list[Answer]]:
    """Start the engine, train it through every version, stop it; its answers before and after."""
    request, processes = setup.request, watch.processes
    publisher = f"tcp://{HOST}:{find_free_port()}"
    watch.table.say(f"starting the {request.engine} engine")
    engine, client = start_engine(setup, watch, "engine", setup.model, publisher)
    before = ask(client, setup)
    watch.table.say(f"starting the trainer, {setup.tensor_parallel} ranks")
    trainer = run(processes, "trainer", trainer_command(trainer_settings(setup, publisher)))
    children = [engine]
    if request.engine == "vllm":
        # The driver lets vLLM's workers join the publisher, and they do not wait long for one.
        watch.wait_until(lambda: is_listening(publisher), "the trainer's publisher", QUIET_TIMEOUT_S)
        driver = driver_command(client.url, publisher, setup.events / "driver.jsonl")
        children.append(run(processes, "driver", driver))
    follow(watch, trainer, request.steps)
    watch.wait_until(
        lambda: client.weight_version().endswith(f".{request.steps}"), f"the engine's version {request.steps}", 60.0
    )
    live = ask(client, setup)
    for child in reversed(children):
        processes.stop(child)
    watch.look()
    return before, live


def start_engine(
    setup: Setup, watch: Watch, name: str, model: Path, publisher: str | None = None
) -> tuple[Child, EngineClient]:
    """Start an engine on `model` and return when it answers."""
    port = find_free_port()
    events = setup.events / f"{name}.jsonl" if publisher is not None else None
    command = engine_command(setup.request.engine, model, port=port, publisher=publisher, events=events)
    child = run(watch.processes, name, command)
    client = EngineClient(f"http://{HOST}:{port}")
    watch.wait_until(client.is_healthy, f"the {setup.request.engine} engine", ENGINE_START_TIMEOUT_S)
    return child, client


def run(processes: Processes, name: str, command: Command) -> Child:
    """Start one command."""
    return processes.start(name, command.arguments, dict(command.env))


def trainer_settings(setup: Setup, publisher: str) -> TrainerSettings:
    """What this setup's trainer is told."""
    return TrainerSettings(
        model=setup.model,
        data=setup.request.data,
        steps=setup.request.steps,
        tensor_parallel=setup.tensor_parallel,
        learning_rate=setup.learning_rate,
        publisher=publisher,
        export=setup.export,
        events=setup.events / "trainer.jsonl",
        master_port=find_free_port(),
    )


def follow(watch: Watch, trainer: Child, steps: int) -> None:
    """Show every version as it is served, until the trainer ends. Raises when anything else ends first."""
    deadline_s = time.monotonic() + QUIET_TIMEOUT_S
    said = -1
    while trainer.is_running():
        if watch.look(may_end=trainer):
            deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(f"the trainer did nothing for {QUIET_TIMEOUT_S:.0f} s; see {trainer.log}")
        if watch.phases and said != len(watch.rows):
            said = len(watch.rows)
            watch.table.say(f"training: step {said + 1} of {steps}" if said < steps else "exporting", passing=True)
        time.sleep(POLL_S)
    watch.look(may_end=trainer)
    if trainer.popen.returncode != 0:
        raise trainer.lost()
    watch.processes.stop(trainer)


def ask(client: EngineClient, setup: Setup) -> list[Answer]:
    """The engine's answers to all questions."""
    return [client.complete(question, setup.request.max_tokens) for question in QUESTIONS]


def is_listening(address: str) -> bool:
    """Whether something accepts connections at a `tcp://host:port` address."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within it, SIGTERM unwinds the stack like Ctrl-C does, so that child processes are ended."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
