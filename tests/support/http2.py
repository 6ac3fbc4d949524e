"""The few frames of HTTP/2 (RFC 9113) that a client needs which takes no answers: gRPC's own always takes them."""

import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4


def greeting() -> bytes:
    """The beginning of a connection on whose streams no byte of an answer may be sent."""
    return _PREFACE + _frame(_SETTINGS, 0, 0, struct.pack("!HI", _INITIAL_WINDOW_SIZE, 0))


def call(stream: int, method: str, message: bytes, headers: dict[str, str]) -> bytes:
    """A whole call of one message on the stream of that odd number."""
    block = b"".join(
        _literal(name, value)
        for name, value in {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
            **headers,
        }.items()
    )
    body = struct.pack("!BI", 0, len(message)) + message
    return _frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_DATA, _END_STREAM, stream, body)


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
