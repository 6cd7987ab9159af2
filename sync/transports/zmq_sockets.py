"""ZeroMQ sockets: addresses, keys and the options that every socket of ours has.

Addresses are `tcp://HOST:PORT` (port 0 or * picks a free one) and `ipc://PATH`. Without keys only loopback and ipc
are allowed: ZeroMQ's plain mechanism lets anyone who reaches the port speak. With `CurveKeys`, traffic is encrypted
and only peers whose public key is on the list are heard.
"""

import ipaddress
import os
import re
import secrets
import socket as os_socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from weightcast.sync.errors import AddressError

MAX_IPC_PATH_BYTES = 107
_ANY_HOST = ("*", "0.0.0.0", "[::]")


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """CurveZMQ keys of one process, in Z85 (40 characters) as `zmq.curve_keypair()` makes them.

    `public` and `secret` are its own. An engine, or a source other than rank 0, also needs `server`, the public key
    of the processes it connects to. Sources share one key pair; `allowed` lists the public keys that they listen to,
    the engines' and, where there is more than one source, their own.
    """

    public: bytes
    secret: bytes
    server: bytes | None = None
    allowed: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address."""

    transport: str
    host: str
    port: str

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}" if self.transport == "tcp" else f"ipc://{self.host}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.transport == "ipc" or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def parse_address(address: str) -> Address:
    """`AddressError` unless `address` is tcp://HOST:PORT or ipc://PATH."""
    if match := re.fullmatch(r"tcp://(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):(\d{1,5}|\*)", address):
        if match[2] == "*" or int(match[2]) <= 65535:
            return Address("tcp", match[1], "*" if match[2] == "0" else match[2])
    elif match := re.fullmatch(r"ipc://(/\S+)", address):
        if len(os.fsencode(match[1])) <= MAX_IPC_PATH_BYTES:
            return Address("ipc", match[1], "")
        raise AddressError(f"the path of {address!r} is longer than {MAX_IPC_PATH_BYTES} bytes; choose a shorter one")
    raise AddressError(
        f"cannot read the address {address!r}; use tcp://HOST:PORT (e.g. tcp://127.0.0.1:5600) or ipc:///PATH"
    )


def bind(
    context: zmq.Context[zmq.Socket[bytes]], address: str, keys: CurveKeys | None, max_message_bytes: int
) -> tuple[zmq.Socket[bytes], str]:
    """A ROUTER bound to `address`, and where it is bound; larger frames than `max_message_bytes` end a connection.

    Raises `AddressError` when the address is in use, or reachable from other machines without keys.
    """
    parsed = parse_address(address)
    if keys is None and not parsed.is_local:
        raise AddressError(
            f"{address} can be reached from other machines, where anyone could read or replace the weights; "
            "pass keys=CurveKeys(...), or bind to tcp://127.0.0.1 or ipc://"
        )
    if keys is not None and not keys.allowed:
        raise AddressError(
            f"keys for {address} allow nobody, and ZeroMQ would then admit every key; "
            "list the public keys of the engines and sources in CurveKeys.allowed"
        )
    socket = context.socket(zmq.ROUTER)
    _set_options(socket, parsed)
    socket.maxmsgsize = max_message_bytes
    if keys is not None:
        socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
        socket.curve_server = True
    try:
        if parsed.transport == "ipc":
            _check_ipc_is_free(parsed)
        socket.bind(str(parsed))
        if parsed.transport == "ipc":
            Path(parsed.host).chmod(0o600)
    except zmq.ZMQError as error:
        socket.close(0)
        if error.errno == zmq.EADDRINUSE:
            raise _in_use(address) from None
        raise AddressError(f"cannot bind to {address}: {error}") from None
    except AddressError:
        socket.close(0)
        raise
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return socket, endpoint.rstrip("\0")


def remove_ipc_file(address: str) -> None:
    """ZeroMQ leaves the socket file of an ipc address behind; call after the socket was closed."""
    parsed = parse_address(address)
    if parsed.transport == "ipc":
        Path(parsed.host).unlink(missing_ok=True)


def _check_ipc_is_free(parsed: Address) -> None:
    """ZeroMQ removes a socket file before it binds, and so would take a living publisher's address away."""
    if not Path(parsed.host).exists():
        return
    with os_socket.socket(os_socket.AF_UNIX, os_socket.SOCK_STREAM) as probe:
        try:
            probe.connect(parsed.host)
        except OSError:
            return
    raise _in_use(str(parsed))


def _in_use(address: str) -> AddressError:
    return AddressError(
        f"{address} is in use by another process; stop the publisher that holds it, or choose another port "
        "(port 0 picks a free one; WeightPublisher.address says which)"
    )


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, keys: CurveKeys | None, max_message_bytes: int
) -> zmq.Socket[bytes]:
    """A DEALER connected to `address`; frames of more than `max_message_bytes` end the connection."""
    parsed = parse_address(address)
    if parsed.host in _ANY_HOST or parsed.port == "*":
        raise AddressError(f"cannot connect to {address}: name a host and a port")
    if keys is not None and keys.server is None:
        raise AddressError(f"keys for {address} lack `server`, the publisher's public key")
    socket = context.socket(zmq.DEALER)
    _set_options(socket, parsed)
    socket.maxmsgsize = max_message_bytes
    if keys is not None:
        socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
        socket.curve_serverkey = keys.server
    socket.connect(str(parsed))
    return socket


def read_until(socket: zmq.Socket[bytes], is_it: Callable[[list[bytes]], bool], timeout_s: float) -> bool:
    """Read what comes, and drop it, until `is_it` says so of a message's frames; False when that takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        if socket.poll(int(left_s * 1000) + 1) and is_it(socket.recv_multipart()):
            return True
    return False


def wake(socket: zmq.Socket[bytes]) -> None:
    """Wake the thread that polls the other end of a pair, unless it has closed that end or is woken already.

    A plain send would then wait for the thread, which may need a lock that the caller holds.
    """
    with suppress(zmq.Again):
        socket.send(b"", zmq.NOBLOCK)


def _set_options(socket: zmq.Socket[bytes], address: Address) -> None:
    socket.linger = 0
    # Credit bounds what is under way; ZeroMQ's own marks would drop messages to slow peers without a word.
    socket.sndhwm = 0
    socket.rcvhwm = 0
    socket.ipv6 = address.host.startswith("[")
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000


def make_context(keys: CurveKeys | None) -> tuple[zmq.Context[zmq.Socket[bytes]], ThreadAuthenticator | None]:
    """A context of one's own, and the thread that admits only the allowed keys, when this process listens."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    if keys is None or not keys.allowed:
        return context, None
    guard = ThreadAuthenticator(context)
    guard.start()
    guard.configure_curve_callback(domain="*", credentials_provider=_AllowList(keys.allowed))
    return context, guard


class _AllowList:
    def __init__(self, allowed: tuple[bytes, ...]) -> None:
        self._allowed = frozenset(allowed)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the peer with this public key (Z85) may speak."""
        return key in self._allowed


def data_address(address: str, rank: int) -> str:
    """Where a source serves its chunks: a free port on the interface that leads to rank 0, or a path beside its."""
    parsed = parse_address(address)
    if parsed.transport == "ipc":
        return f"ipc://{parsed.host}.{rank}-{os.getpid()}-{secrets.token_hex(3)}"
    host = parsed.host if parsed.is_local else own_host(parsed)
    return f"tcp://{host}:*"


def own_host(toward: Address) -> str:
    """This machine's address on the interface from which `toward` is reached; no packet is sent."""
    if toward.is_local or toward.transport == "ipc":
        return "127.0.0.1"
    host = "192.0.2.1" if toward.host in _ANY_HOST else toward.host
    with os_socket.socket(os_socket.AF_INET, os_socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
