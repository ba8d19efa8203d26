"""A door in front of a TCP server: shut, slow, torn, or one that loses the answers. Knows bytes alone."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What happens to bytes on their way.

    Attributes:
        bytes_per_s: Of each connection and direction; None lets them run.
        torn_within: A connection is cut after a random number of bytes below this; None cuts none.
        loses_answers: A connection is cut when the server begins to answer: the request was heard, the answer is not.
        next_answer: Only so many bytes of the next answer pass, then its connection is cut and the weather is fair. An answer
            that has no more bytes passes whole.
    """

    bytes_per_s: int | None = None
    torn_within: int | None = None
    loses_answers: bool = False
    next_answer: int | None = None


FAIR = Weather()


class Gate:
    """Forwards `port` of the loopback to a server while it is open.

    Args:
        target: Port of the server, on the loopback.

    Attributes:
        weather: Can be set at any time; connections that stand feel it, too.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []
        self.weather = FAIR
        self.port = 0
        self.open()

    def open(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        with self._lock:
            listener, self._listener = self._listener, None
            connections, self._connections = self._connections, []
        for item in [*connections, *([listener] if listener else [])]:
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)
            item.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            with self._lock:
                if self._listener is not listener:
                    near.close()
                    far.close()
                    return
                self._connections += [near, far]
            for source, sink, is_answer in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._forward, args=(source, sink, is_answer), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        passed, torn_at, known = 0, 0, FAIR
        with suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if (weather := self.weather) != known:
                    known, passed = weather, 0
                    torn_at = random.randrange(weather.torn_within) if weather.torn_within else 0
                if weather.loses_answers and is_answer:
                    break
                if weather.next_answer is not None and is_answer and passed + len(data) > weather.next_answer:
                    self.weather = FAIR
                    sink.sendall(data[: weather.next_answer - passed])
                    break
                if weather.torn_within and passed + len(data) > torn_at:
                    sink.sendall(data[: torn_at - passed])
                    break
                passed += len(data)
                if weather.bytes_per_s:
                    time.sleep(len(data) / weather.bytes_per_s)
                sink.sendall(data)
        for item in (source, sink):
            with suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)


_CHUNK_BYTES = 1 << 14


@contextmanager
def gate_to(port: int) -> Iterator[Gate]:
    """An open gate in front of a port of the loopback; shut at the end."""
    gate = Gate(port)
    try:
        yield gate
    finally:
        gate.shut()
