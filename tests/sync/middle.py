"""A man in the middle: a real forwarder between engines and a publisher, whose chunks a test may alter.

It passes control messages on as they are, but for the addresses of the sources, which it replaces by its own, and
tickets, which would lead around it. With `alter_stream` those to TCP links stay, and lead through a forwarder.

    with Middle(publisher.address, alter) as middle:
        WeightSubscriber(middle.address)
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import zmq
from tests.sync import tcp_parts

from weightcast.sync.messages import Announce, ChunkHeader, Layout, decode, encode
from weightcast.sync.records import Ticket
from weightcast.sync.transports.tcp_wire import pack_ticket, read_ticket

Alter = Callable[[int, bytes, bytes], list[list[bytes]]]
"""(chunk index, header frame, body) -> the messages that the engine gets instead."""


def pass_on(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
    """Alter nothing."""
    return [[header, body]]


class Middle:
    """See the module. `alter` may be replaced at any time."""

    def __init__(self, target: str, alter: Alter = pass_on, alter_stream: tcp_parts.Alter | None = None) -> None:
        self.alter = alter
        self._alter_stream = alter_stream
        self._forwarders: dict[int, tcp_parts.Forwarder] = {}
        self._target = target
        self._data_target = ""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control, self.address = self._listen()
        self._data, self._data_address = self._listen()
        self._back: dict[tuple[zmq.Socket[bytes], bytes, str], zmq.Socket[bytes]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _listen(self) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        return socket, f"tcp://127.0.0.1:{port}"

    def _run(self) -> None:
        while not self._stop.is_set():
            poller = zmq.Poller()
            for socket in (self._control, self._data, *self._back.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(20))
            for front in (self._control, self._data):
                while front.poll(0):
                    peer, *frames = front.recv_multipart()
                    self._back_for(front, peer).send_multipart(frames)
            for (front, peer, _), back in list(self._back.items()):
                if back in ready:
                    for message in self._change(front, back.recv_multipart()):
                        front.send_multipart([peer, *message])
        self._context.destroy(linger=0)

    def _back_for(self, front: zmq.Socket[bytes], peer: bytes) -> zmq.Socket[bytes]:
        key = (front, peer, self._target if front is self._control else self._data_target)
        if key not in self._back:
            self._back[key] = self._context.socket(zmq.DEALER)
            self._back[key].linger = 0
            self._back[key].connect(key[2])
        return self._back[key]

    def _change(self, front: zmq.Socket[bytes], frames: list[bytes]) -> list[list[bytes]]:
        message = decode(frames[0])
        if isinstance(message, ChunkHeader) and len(frames) == 2:
            return self.alter(message.index, *frames)
        if isinstance(message, Announce):
            return [[encode(replace(message, tickets=self._redirect(message.tickets)))]]
        if isinstance(message, Layout):
            (offer,) = message.offers
            self._data_target = offer.address
            return [[encode(replace(message, offers=(replace(offer, address=self._data_address),)))]]
        return [frames]

    def _redirect(self, tickets: tuple[Ticket, ...]) -> tuple[Ticket, ...]:
        redirected = []
        for ticket in tickets if self._alter_stream is not None else ():
            if ticket.kind == "tcp" and self._alter_stream is not None:
                real = read_ticket(ticket.data)
                if real.port not in self._forwarders:
                    self._forwarders[real.port] = tcp_parts.Forwarder(real.port, self._alter_stream)
                data = pack_ticket(replace(real, port=self._forwarders[real.port].port))
                redirected.append(replace(ticket, data=data))
        return tuple(redirected)

    def __enter__(self) -> "Middle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        for forwarder in self._forwarders.values():
            forwarder.__exit__(None, None, None)
