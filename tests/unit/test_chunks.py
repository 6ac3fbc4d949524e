"""Chunks that pass protobuf by are the messages of the contract, on both sides."""

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.chunks import DOWNLOADED, UPLOADED, Chunk, ChunkCodec
from tiltyard.registry.v1.artifact_pb2 import DownloadArtifactResponse, UploadArtifactRequest, UploadHeader

KINDS = [(UPLOADED, UploadArtifactRequest), (DOWNLOADED, DownloadArtifactResponse)]


@pytest.mark.parametrize(("codec", "kind"), KINDS)
@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 1 << 20])
def test_a_chunk_is_the_message_that_protobuf_makes(codec: ChunkCodec, kind: type[Message], size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    generated = kind(chunk=content).SerializeToString()
    decoded = codec.decode(generated)
    assert bytes(decoded.chunk) == content
    if size:  # of an empty field there may be nothing on the wire
        assert codec.encode(Chunk(content)) == generated
        assert isinstance(decoded, Chunk)
        assert codec.encode(decoded) == generated


def test_headers_are_messages() -> None:
    header = UploadArtifactRequest(header=UploadHeader(artifact="artifacts/a", size_bytes=7, task="tasks/t"))
    assert UPLOADED.decode(UPLOADED.encode(header)) == header
    assert UPLOADED.decode(b"") == UploadArtifactRequest()
    assert UPLOADED.decode(b"").WhichOneof("content") is None
    assert UPLOADED.decode(UPLOADED.encode(Chunk(b"x"))).WhichOneof("content") == "chunk"


@pytest.mark.parametrize(("codec", "kind"), KINDS)
def test_what_is_encoded_otherwise_is_read_as_protobuf_reads_it(codec: ChunkCodec, kind: type[Message]) -> None:
    one = kind(chunk=b"one").SerializeToString()
    longer = one[:1] + b"\x83\x80\x00" + one[2:]  # the same length in more bytes
    for received in (one + one, one + b"\x98\x06\x01", b"\x98\x06\x01" + one, longer):
        assert bytes(codec.decode(received).chunk) == b"one"


@pytest.mark.parametrize(("codec", "kind"), KINDS)
@given(received=st.binary(max_size=40))
def test_any_bytes_mean_what_they_mean_to_protobuf(codec: ChunkCodec, kind: type[Message], received: bytes) -> None:
    # Mostly such as begin like a chunk.
    for each in (received, kind(chunk=b"x").SerializeToString()[:1] + received):
        try:
            expected = kind.FromString(each)
        except DecodeError:
            with pytest.raises(DecodeError):
                codec.decode(each)
        else:
            assert bytes(codec.decode(each).chunk) == expected.chunk  # type: ignore[attr-defined]
