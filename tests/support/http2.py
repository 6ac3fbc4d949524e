"""A client of HTTP/2 (RFC 9113) that takes no answers and leaves messages half sent: gRPC's own does neither."""

import asyncio
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_ACKNOWLEDGED, _END_STREAM, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4
_MOST_IN_FRAME = 16_384
_WINDOW = 65_535


def greeting(*, window: int = 0) -> bytes:
    """The beginning of a connection on each of whose streams, and in all, so many bytes of answers may be sent."""
    settings = _frame(_SETTINGS, 0, 0, struct.pack("!HI", _INITIAL_WINDOW_SIZE, window))
    return _PREFACE + settings + (_frame(_WINDOW_UPDATE, 0, 0, struct.pack("!I", window)) if window else b"")


def call(stream: int, method: str, message: bytes, headers: dict[str, str]) -> bytes:
    """A whole call of one message on the stream of that odd number."""
    return _begin(stream, method, headers) + _frame(_DATA, _END_STREAM, stream, _framed(message))


async def push(port: int, method: str, headers: dict[str, str], *, calls: int, message_bytes: int) -> int:
    """Begins calls with messages of that size and sends of each, but for its last byte, what the server lets it.

    Returns how many bytes those were, when for a second it has asked for no more.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    streams = range(1, 2 * calls, 2)
    writer.write(greeting() + b"".join(_begin(stream, method, headers) for stream in streams))
    left = {stream: _framed(bytes(message_bytes))[:-1] for stream in streams}
    room = dict.fromkeys([0, *streams], _WINDOW)
    sent, initial = 0, _WINDOW
    try:
        while True:
            for stream, rest in left.items():
                while count := min(_MOST_IN_FRAME, len(rest), room[stream], room[0]):
                    writer.write(_frame(_DATA, 0, stream, rest[:count]))
                    left[stream] = rest = rest[count:]
                    room[stream] -= count
                    room[0] -= count
                    sent += count
            await writer.drain()
            try:
                async with asyncio.timeout(1):
                    head = await reader.readexactly(9)
            except TimeoutError:
                return sent
            kind, flags, stream = struct.unpack("!BBI", head[3:])
            payload = await reader.readexactly(int.from_bytes(head[:3]))
            if kind == _WINDOW_UPDATE:
                room[stream] += int.from_bytes(payload)
            elif kind == _SETTINGS and not flags & _ACKNOWLEDGED:
                for name, value in struct.iter_unpack("!HI", payload):
                    if name == _INITIAL_WINDOW_SIZE:
                        room |= {stream: room[stream] + value - initial for stream in left}
                        initial = value
                writer.write(_frame(_SETTINGS, _ACKNOWLEDGED, 0, b""))
            elif kind == _PING and not flags & _ACKNOWLEDGED:
                writer.write(_frame(_PING, _ACKNOWLEDGED, 0, payload))
            elif kind == _RESET:
                left.pop(stream, None)
    finally:
        writer.close()


def _begin(stream: int, method: str, headers: dict[str, str]) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **headers,
    }
    return _frame(_HEADERS, _END_HEADERS, stream, b"".join(_literal(*field) for field in fields.items()))


def _framed(message: bytes) -> bytes:
    return struct.pack("!BI", 0, len(message)) + message


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header field that no table keeps (RFC 7541, 6.2.2)."""
    return b"\x00" + _string(name.encode()) + _string(value.encode())


def _string(text: bytes) -> bytes:
    length, rest = bytearray(), len(text) - 127
    if rest < 0:
        return bytes([len(text)]) + text
    while rest >= 128:
        length.append(rest % 128 | 128)
        rest //= 128
    return bytes([127, *length, rest]) + text
