"""Numbers as protobuf writes them before what has a length: https://protobuf.dev/programming-guides/encoding/."""


def encode_varint(value: int) -> bytes:
    """A natural number, seven bits a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
