"""What crosses a TCP link of `tcp.py`: a ticket, a first word, requests, and chunks. Pure.

    engine -> source    MAGIC and the ticket's token, then one request after the other: its length, a `ChunkRequest`
    source -> engine    ADMITTED, then chunks: the lengths of both, a `ChunkHeader`, its body

A chunk of two lengths of zero is a beat: the source is there, and the chunk that is waited for is not packed yet.
"""

import ipaddress
import struct
from dataclasses import dataclass
from typing import Any

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.messages import ChunkHeader, ChunkRequest, decode, encode
from weightcast.sync.schema import binary, checked, uint

KIND = "tcp"
MAX_TICKET_BYTES = 1024
TOKEN_BYTES = 32
MAGIC = b"weightcast-tcp-1"
ADMITTED = b"\x01"
MAX_REQUEST_BYTES = 4096
MAX_HEADER_BYTES = 4096
REQUEST_PREFIX = struct.Struct("<I")
CHUNK_PREFIX = struct.Struct("<II")
BEAT = CHUNK_PREFIX.pack(0, 0)
BEAT_EVERY_S = 0.25


def known_host(value: Any) -> str:
    """An IP address: names are looked up where the socket is bound, not where a stranger says."""
    try:
        return str(ipaddress.ip_address(value if isinstance(value, str) else ""))
    except ValueError:
        raise WireError(f"an IP address was expected, got {schema.show(value)}") from None


@dataclass(frozen=True, slots=True)
class TcpTicket:
    """Where a source sends chunks, and what to say there first."""

    host: str = checked(known_host)
    port: int = checked(uint(65535))
    token: bytes = checked(binary(TOKEN_BYTES))


def pack_ticket(ticket: TcpTicket) -> bytes:
    """A ticket as it is announced."""
    return schema.pack(KIND, ticket)


def read_ticket(raw: bytes) -> TcpTicket:
    """A ticket, checked. Raises `WireError`."""
    if len(raw) > MAX_TICKET_BYTES:
        raise WireError(f"a ticket of {len(raw)} bytes exceeds the limit of {MAX_TICKET_BYTES}")
    ticket: TcpTicket = schema.unpack(raw, {KIND: TcpTicket})
    if len(ticket.token) != TOKEN_BYTES or not ticket.port:
        raise WireError(f"a ticket with a token of {len(ticket.token)} bytes for port {ticket.port}")
    return ticket


def pack_request(request: ChunkRequest) -> bytes:
    """A request with its length."""
    raw = encode(request)
    return REQUEST_PREFIX.pack(len(raw)) + raw


def read_request(raw: bytes) -> ChunkRequest:
    """A request without its length. Raises `WireError`."""
    request = decode(raw)
    if not isinstance(request, ChunkRequest):
        raise WireError(f"a {type(request).__name__} instead of a request")
    return request


def pack_header(header: ChunkHeader, num_bytes: int) -> bytes:
    """What goes before a body of `num_bytes`."""
    raw = encode(header)
    assert len(raw) <= MAX_HEADER_BYTES
    return CHUNK_PREFIX.pack(len(raw), num_bytes) + raw


def read_header(raw: bytes | memoryview) -> ChunkHeader:
    """A header without its lengths. Raises `WireError`."""
    header = decode(raw)
    if not isinstance(header, ChunkHeader) or header.count != 1:
        raise WireError(f"a {type(header).__name__} instead of one chunk's header")
    return header
