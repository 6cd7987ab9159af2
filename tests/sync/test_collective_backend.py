"""Process groups beside the trainer's: ranks that do not come, stores, addresses and backends that cannot be used."""

import time

import psutil
import pytest
import torch
from tests.sync.parts import WAIT_S

from weightcast.sync.errors import AddressError, ConfigError, DeadlineExceeded
from weightcast.sync.transports.collective_backend import (
    BroadcastGroup,
    call_within,
    check_backend,
    connect_store,
    listen_store,
)
from weightcast.sync.transports.collective_group import parse_address


def test_ranks_that_do_not_come_are_a_deadline() -> None:
    store = listen_store("127.0.0.1", 0, WAIT_S)
    with pytest.raises(DeadlineExceeded, match="rank 0 of 2 did not meet the other ranks within 0"):
        BroadcastGroup.build("gloo", store, 0, 2, 0.5, "127.0.0.1")


def test_stores_listen_on_the_address_given_and_no_other() -> None:
    store = listen_store("127.0.0.2", 0, WAIT_S)
    connect_store("127.0.0.2", store.port, time.monotonic() + WAIT_S)
    sockets = psutil.Process().net_connections("tcp")
    listening = {row.laddr.ip for row in sockets if row.status == psutil.CONN_LISTEN and row.laddr.port == store.port}
    assert listening == {"127.0.0.2"}
    with pytest.raises(DeadlineExceeded, match="nobody listens"):
        connect_store("127.0.0.3", 1, time.monotonic() + 0.2)
    with pytest.raises(AddressError, match="give a free port"):
        listen_store("127.0.0.2", store.port, WAIT_S)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://*:1", "ipc://x", "tcp://a", "tcp://a:x"])
def test_addresses_that_cannot_be_used(address: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(address)


def test_backends_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="choose one of gloo, nccl"):
        check_backend("mpi")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="use 'gloo'"):
            check_backend("nccl")


def test_calls_have_a_limit() -> None:
    assert call_within(lambda: 7, 1.0) == 7
    with pytest.raises(TimeoutError, match="no answer within 0"):
        call_within(lambda: time.sleep(2), 0.1)
    with pytest.raises(ZeroDivisionError):
        call_within(lambda: 1 // 0, 1.0)
