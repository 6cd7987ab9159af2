"""A source's side of TCP links: it sends chunks of its snapshot as they are packed, without a copy of its own.

    server = TcpChunkServer("127.0.0.1")      # server.ticket goes into announcements
    server.hold(snapshot)
    server.notify()                           # more of it is packed

Each link has a thread, which sleeps in the kernel while its engine is slow: an engine has two runs of chunks asked for
at most, and whatever else it asks waits in its own socket. What is sent lies in the snapshot, so a slow engine costs no
memory here. Nothing is read of a link before the ticket's token came, and that is compared in constant time.

Nothing is encrypted: whoever can listen on the way sees the weights, and the token. A body of a whole chunk carries no
hash, since the tensors' digests vouch for it, as they do for memory that engines read; a delta carries one.
"""

import contextlib
import hmac
import secrets
import socket
import threading
import time

from weightcast.sync.errors import AddressError, WireError
from weightcast.sync.host.server import close_in_children
from weightcast.sync.messages import ChunkHeader, ChunkRequest
from weightcast.sync.snapshot import ABSENT, Body, Snapshot
from weightcast.sync.transports import tcp_wire
from weightcast.sync.transports.tcp_sending import SendingLink
from weightcast.sync.version import Version

MAX_LINKS = 256
MAX_STRANGERS = 16
FIRST_WORD_S = 5.0
STALL_S = 30.0


class TcpChunkServer:
    """See the module. `AddressError` when nothing can be bound at `host`, an IP address of this machine.

    A link on which nothing could be sent for `stall_s` is closed. At most `max_links` are open at once, of which
    `max_strangers` have not said the token yet, for which they have `first_word_s`; others are refused.
    """

    def __init__(
        self,
        host: str,
        *,
        max_links: int = MAX_LINKS,
        max_strangers: int = MAX_STRANGERS,
        first_word_s: float = FIRST_WORD_S,
        stall_s: float = STALL_S,
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family)
        except OSError as error:
            raise AddressError(f"cannot serve chunks over TCP at {host}: {error}") from None
        self._token = secrets.token_bytes(tcp_wire.TOKEN_BYTES)
        port = int(self._listener.getsockname()[1])
        self.ticket: bytes = tcp_wire.pack_ticket(tcp_wire.TcpTicket(host, port, self._token))
        self.awaited_index: int | None = None
        """The first chunk that somebody waits for; the packer's thread reads it."""
        self.num_refused = 0
        """Links that were closed because of what came, or did not come, over them."""
        self._limits = (max_links, max_strangers, first_word_s)
        self._stall_s = stall_s
        self._lock = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._links: dict[SendingLink, threading.Thread] = {}
        self._stopping = False
        close_in_children(self)
        self._thread = threading.Thread(target=self._accept_all, name="weightcast-tcp", daemon=True)
        self._thread.start()

    # What the source's own threads call

    @property
    def is_sending(self) -> bool:
        """Whether a chunk of a snapshot is on its way out."""
        with self._lock:
            return any(link.is_sending for link in self._links)

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on; requests for another are answered with 'absent'."""
        with self._lock:
            self._snapshot = snapshot
            self._lock.notify_all()

    def drop(self) -> None:
        """Serve nothing; chunks that are being sent still leave."""
        with self._lock:
            self._snapshot = None
            self._lock.notify_all()

    def notify(self) -> None:
        """More of the snapshot is packed."""
        with self._lock:
            self._lock.notify_all()

    def close(self) -> None:
        """End every link."""
        with self._lock:
            self._stopping = True
            links = dict(self._links)
            for sock in (self._listener, *(link.socket for link in links)):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._lock.notify_all()
        for thread in (self._thread, *links.values()):
            thread.join(timeout=5)
        self._listener.close()

    def close_descriptors(self) -> None:
        """In a forked child, which has none of the threads: let go of the copies."""
        for sock in (self._listener, *(link.socket for link in self._links)):
            sock.close()

    # Links

    def _accept_all(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                time.sleep(0.05)  # no descriptor is free, say; whoever knocks still waits
                continue
            self._open(sock)

    def _open(self, sock: socket.socket) -> None:
        max_links, max_strangers, _ = self._limits
        link = SendingLink(sock)
        with self._lock:
            num_strangers = sum(not other.is_known for other in self._links)
            if self._stopping or len(self._links) >= max_links or num_strangers >= max_strangers:
                self.num_refused += 1
                sock.close()
                return
            thread = threading.Thread(target=self._serve, args=(link,), name="weightcast-tcp-link", daemon=True)
            self._links[link] = thread
            thread.start()

    def _serve(self, link: SendingLink) -> None:
        try:
            self._admit(link)
            while (request := link.read_request()) is not None:
                for index in range(request.index, request.index + request.count):
                    self._send(link, request, index)
                link.flush()
        except (OSError, WireError):
            self.num_refused += not self._stopping
        finally:
            with self._lock:
                self._links.pop(link, None)
                self._count_waiting()
            link.socket.close()

    def _admit(self, link: SendingLink) -> None:
        _, _, first_word_s = self._limits
        link.socket.settimeout(first_word_s)
        word = link.read_within(len(tcp_wire.MAGIC) + tcp_wire.TOKEN_BYTES, first_word_s)
        if not hmac.compare_digest(word, tcp_wire.MAGIC + self._token):
            raise WireError("the token is another one")
        link.is_known = True
        link.prepare(self._stall_s)
        link.socket.sendall(tcp_wire.ADMITTED)

    def _send(self, link: SendingLink, request: ChunkRequest, index: int) -> None:
        while (found := self._take(link, request.version, index, request.base)) is None:
            link.flush()
            link.gather(tcp_wire.BEAT)
            link.flush()
        body, body_hash = found
        header = ChunkHeader(request.version, index, body.encoding, body.base, body_hash)
        link.gather(tcp_wire.pack_header(header, body.num_bytes))
        if body.num_bytes:
            link.send_body(body.spread if body.data is None else (body.data,))
        link.is_sending = False

    def _take(self, link: SendingLink, version: Version, index: int, base: Version | None) -> tuple[Body, bytes] | None:
        """The answer to a request and its hash, once the chunk is packed; None when it is time for a beat.

        From here until it is sent the link counts as sending, so that the packer leaves these bits alone.
        """
        with self._lock:
            if self._must_wait(version, index):
                link.awaited_index = index
                self._count_waiting()
                # The packer sees it from here on; what was packed before that is not waited for.
                if self._must_wait(version, index):
                    if link.has_gathered:  # what is ready goes first
                        return None
                    self._lock.wait(tcp_wire.BEAT_EVERY_S)
            if link.awaited_index is not None:  # also of a time before, after which what was ready went first
                link.awaited_index = None
                self._count_waiting()
            if self._must_wait(version, index):
                return None
            if self._stopping:
                raise WireError("the source ends")
            snapshot = self._snapshot
            if snapshot is None or snapshot.version != version:
                return ABSENT, b""
            link.is_sending = True
            body = snapshot.body(index, base, spreads=True)
            return body, b"" if body.encoding == "dense" else snapshot.hash(index, body)

    def _must_wait(self, version: Version, index: int) -> bool:
        snapshot = self._snapshot
        is_held = snapshot is not None and snapshot.version == version and not self._stopping
        return is_held and snapshot is not None and not snapshot.is_ready(index)

    def _count_waiting(self) -> None:
        waiting = (link.awaited_index for link in self._links)
        self.awaited_index = min((index for index in waiting if index is not None), default=None)
