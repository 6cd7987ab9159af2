"""Tables of the small decisions: policies, versions, models, addresses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.sync.parts import make_model, make_specs

from weightcast.sync import CurveKeys, EngineStatus, FleetPolicy, TensorSpec, Version
from weightcast.sync.errors import AddressError, ConfigError
from weightcast.sync.fleet import is_committed, is_finished, is_released, make_report
from weightcast.sync.transports.zmq_sockets import bind, connect, make_context, own_host, parse_address
from weightcast.sync.version import find_model_differences, fingerprint, new_epoch

V0, V1, V2 = Version(1, 0), Version(1, 1), Version(1, 2)
NEW = EngineStatus("e", "receiver", None, 0.0)
STATUS = {
    "staging": NEW,
    "staged": replace(NEW, staged=V1),
    "serving": replace(NEW, staged=V1, serving=V1),
    "ahead": replace(NEW, serving=V2),
    "refused": replace(NEW, refused=V1),
    "lost": replace(NEW, staged=V1, lost=True),
    "observer": replace(NEW, role="observer"),
    "told": replace(NEW, role="observer", serving=V1),
}
ALL, ALL_2, QUORUM_2 = FleetPolicy.all(), FleetPolicy.all(2), FleetPolicy.quorum(2)


@pytest.mark.parametrize(
    ("policy", "engines", "released", "finished", "committed"),
    [
        (ALL, "", True, True, True),
        (ALL, "staging", False, False, False),
        (ALL, "staged", True, False, False),
        (ALL, "serving", True, True, True),
        (ALL, "ahead", True, True, True),
        (ALL, "staged serving", True, False, False),
        (ALL, "staged staging", False, False, False),
        (ALL, "serving refused", False, True, False),
        (ALL, "serving lost", True, True, True),
        (ALL, "lost", True, True, True),
        (ALL, "serving observer", True, False, True),
        (ALL, "serving told", True, True, True),
        (ALL_2, "", False, True, False),
        (ALL_2, "serving", False, True, False),
        (ALL_2, "staged staged", True, False, False),
        (ALL_2, "serving serving", True, True, True),
        (ALL_2, "serving lost", False, True, False),
        (QUORUM_2, "staged staging staging", False, False, False),
        (QUORUM_2, "staged staged staging", True, False, False),
        (QUORUM_2, "serving serving staging", True, True, True),
        (QUORUM_2, "serving serving refused", True, True, True),
        (QUORUM_2, "serving refused refused", False, True, False),
        (QUORUM_2, "serving staged told", True, False, False),
        (QUORUM_2, "told observer", False, False, False),
    ],
)
def test_a_policy_decides(policy: FleetPolicy, engines: str, released: bool, finished: bool, committed: bool) -> None:
    fleet = [STATUS[name] for name in engines.split()]
    assert is_released(policy, fleet, V1) is released
    assert is_finished(policy, fleet, V1) is finished
    assert is_committed(policy, fleet, V1) is committed


@pytest.mark.parametrize(
    ("name", "state", "report"),
    [
        ("staging", "staging", "fenced"),
        ("staged", "staged", "fenced"),
        ("serving", "serving", "serving"),
        ("ahead", "serving", "serving"),
        ("refused", "refused", "refused"),
        ("lost", "lost", "lost"),
        ("observer", "joined", "fenced"),
    ],
)
def test_the_state_of_an_engine(name: str, state: str, report: str) -> None:
    assert STATUS[name].state(V1) == state
    assert make_report(STATUS[name], V1).state == report
    assert STATUS[name].state(None) == ("lost" if name == "lost" else "joined")


@pytest.mark.parametrize(("kind", "count"), [("most", 1), ("all", -1), ("quorum", 0), ("quorum", -2)])
def test_a_policy_that_means_nothing_is_refused(kind: str, count: int) -> None:
    with pytest.raises(ConfigError, match="no such fleet policy"):
        FleetPolicy(kind, count)  # type: ignore[arg-type]


def test_versions_rise_by_epoch_and_then_by_number() -> None:
    order = [Version(0, 9), Version(1, 0), Version(1, 1), Version(2, 0)]
    assert sorted(reversed(order)) == order
    assert Version(3, 4) == Version(3, 4) and str(Version(3, 4)) == "4 (epoch 3)"
    assert new_epoch() > 1_700_000_000_000


A, B = TensorSpec("a", torch.bfloat16, (2, 3)), TensorSpec("b", torch.float32, ())


@pytest.mark.parametrize(
    ("offered", "lines"),
    [
        ((A, B), []),
        ((B, A), []),
        ((A,), ["b: expected, but the publisher does not have it"]),
        ((A, B, replace(A, name="c")), ["c: not expected, but the publisher has it"]),
        ((replace(A, shape=(3, 2)), B), ["a: expected bfloat16 [2, 3], the publisher has bfloat16 [3, 2]"]),
        ((A, replace(B, dtype=torch.int8)), ["b: expected float32 [], the publisher has int8 []"]),
    ],
)
def test_differences_between_models_are_named(offered: tuple[TensorSpec, ...], lines: list[str]) -> None:
    assert find_model_differences((A, B), offered) == lines
    assert (fingerprint((A, B)) == fingerprint(offered)) == (not lines)


def test_a_fingerprint_tells_models_apart() -> None:
    specs = make_specs(make_model(1))
    assert len({fingerprint(tuple(specs)), fingerprint(tuple(specs[1:])), fingerprint(())}) == 3


@pytest.mark.parametrize(
    ("address", "text", "local"),
    [
        ("tcp://127.0.0.1:5600", "tcp://127.0.0.1:5600", True),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*", True),
        ("tcp://127.8.8.8:*", "tcp://127.8.8.8:*", True),
        ("tcp://localhost:1", "tcp://localhost:1", True),
        ("tcp://[::1]:65535", "tcp://[::1]:65535", True),
        ("tcp://0.0.0.0:1", "tcp://0.0.0.0:1", False),
        ("tcp://*:1", "tcp://*:1", False),
        ("tcp://10.0.0.7:1", "tcp://10.0.0.7:1", False),
        ("tcp://localhost.example:1", "tcp://localhost.example:1", False),
        ("tcp://127.0.0.1.example:1", "tcp://127.0.0.1.example:1", False),
        ("ipc:///run/x.sock", "ipc:///run/x.sock", True),
    ],
)
def test_addresses_are_read(address: str, text: str, local: bool) -> None:
    assert str(parse_address(address)) == text
    assert parse_address(address).is_local is local


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:5600",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:56 ",
        "tcp://a b:1",
        "tcp://::1:1",
        "tcp://127.0.0.1:1;127.0.0.1:2",
        "udp://127.0.0.1:1",
        "inproc://x",
        "ipc://relative",
        "ipc://@abstract",
        "ipc:///" + "x" * 107,
    ],
)
def test_addresses_that_mean_nothing_are_refused(address: str) -> None:
    with pytest.raises(AddressError, match=r"use tcp://HOST:PORT|choose a shorter one"):
        parse_address(address)


def test_who_may_be_bound_and_connected_to(tmp_path: Path) -> None:
    context, _ = make_context(None)
    with context:
        for address in ("tcp://0.0.0.0:0", "tcp://*:0"):
            with pytest.raises(AddressError, match="from other machines"):
                bind(context, address, None, 1000)
            with pytest.raises(AddressError, match="name a host and a port"):
                connect(context, address, None, 1000)
        with pytest.raises(AddressError, match="allow nobody"):
            bind(context, "tcp://127.0.0.1:0", CurveKeys(b"p" * 40, b"s" * 40), 1000)
        with pytest.raises(AddressError, match="lack `server`"):
            connect(context, "tcp://127.0.0.1:1", CurveKeys(b"p" * 40, b"s" * 40), 1000)
        with pytest.raises(AddressError, match="cannot bind"):
            bind(context, f"ipc://{tmp_path}/no/such/folder", None, 1000)
        context.destroy(linger=0)


def test_own_host_is_loopback_toward_loopback() -> None:
    assert own_host(parse_address("tcp://127.0.0.1:1")) == "127.0.0.1"
    assert own_host(parse_address("ipc:///x")) == "127.0.0.1"
