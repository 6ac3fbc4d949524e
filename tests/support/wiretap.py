"""A tap on a real connection: bytes go through it as they come and are kept, and labels are looked for among them."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


class Tap:
    """Listens beside a server and hands every byte on to it and back; `sent` and `received` are the client's words."""

    def __init__(self, server: str, listen: str) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._kept: dict[bool, list[bytes]] = {True: [], False: []}
        self._open: list[socket.socket] = []
        self._listener = _bound(listen)
        self.address = listen if listen.startswith("unix:") else f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def sent(self) -> bytes:
        return self._joined(True)

    @property
    def received(self) -> bytes:
        return self._joined(False)

    def close(self) -> None:
        with self._lock:
            sockets = [self._listener, *self._open]
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _joined(self, from_client: bool) -> bytes:
        with self._lock:
            return b"".join(self._kept[from_client])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client, _ = self._listener.accept()
                server = _connected(self._server)
                with self._lock:
                    self._open += [client, server]
                for source, sink, from_client in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, sink, from_client), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_client: bool) -> None:
        with contextlib.suppress(OSError):  # one side went away
            while piece := source.recv(1 << 20):
                with self._lock:
                    self._kept[from_client].append(piece)
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def tapped(server: str, listen: str = "127.0.0.1:0") -> Iterator[Tap]:
    """A tap before a server at `HOST:PORT` or `unix:PATH`."""
    tap = Tap(server, listen)
    try:
        yield tap
    finally:
        tap.close()


def labels_in(wire: bytes, labels: Sequence[int], *, run: int = 4) -> list[str]:
    """The encodings in which `run` labels in a row stand in these bytes; by chance, none does.

    Labels must differ from their neighbours and be 256 or more, so that each takes more than a byte.
    """
    found = []
    for name, encoded in _encodings(labels):
        # The bytes of one run may be cut by a frame; those of every run cannot.
        runs = (b"".join(encoded[start : start + run]) for start in range(0, len(encoded) - run + 1, run))
        if any(each in wire for each in runs):
            found.append(name)
    return found


def _encodings(labels: Sequence[int]) -> Iterator[tuple[str, list[bytes]]]:
    for dtype in ("<i8", ">i8", "<i4", ">i4", "<u2", ">u2", "<f8", "<f4", ">f4"):
        yield dtype, [np.array(label, dtype).tobytes() for label in labels]
    yield "varints", [_varint(label) for label in labels]
    yield "zigzag varints", [_varint(2 * label) for label in labels]
    for separator in (b"", b",", b", ", b" ", b"\n"):
        yield f"text with {separator!r}", [str(label).encode() + separator for label in labels]
        yield f"hex with {separator!r}", [f"{label:x}".encode() + separator for label in labels]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _bound(address: str) -> socket.socket:
    if address.startswith("unix:"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(Path(address.removeprefix("unix:"))))
        listener.listen()
        return listener
    host, _, port = address.rpartition(":")
    return socket.create_server((host, int(port)))


def _connected(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(address.removeprefix("unix:"))
        return connected
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))
