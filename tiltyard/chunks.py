"""The chunks of artifacts on the wire, past protobuf's copies; what is on the wire stays the contract's.

Protobuf copies a chunk when a message is made, when it is serialised, when it is parsed and when it is read. Here it is
copied once, behind the few bytes that say which field it is and how long. Encoding:
https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import Message

from tiltyard.registry.v1 import artifact_pb2, artifact_pb2_grpc
from tiltyard.varint import encode_varint

if TYPE_CHECKING:
    _GeneratedStub = artifact_pb2_grpc.ArtifactServiceAsyncStub
else:
    _GeneratedStub = artifact_pb2_grpc.ArtifactServiceStub

UPLOAD = "UploadArtifact"
DOWNLOAD = "DownloadArtifact"
SERVICE = artifact_pb2.DESCRIPTOR.services_by_name["ArtifactService"].full_name
_LENGTH_DELIMITED = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Stands for a message of which nothing but the field `chunk` is set."""

    chunk: bytes | memoryview

    def WhichOneof(self, _oneof: str) -> str:
        """The field that is set."""
        return "chunk"


class ChunkCodec:
    """(De)serialises the messages of one type, those that hold a chunk as `Chunk`."""

    def __init__(self, kind: type[Message]) -> None:
        self._parse: Callable[[bytes], Any] = kind.FromString
        self._head = bytes((kind.DESCRIPTOR.fields_by_name["chunk"].number << 3 | _LENGTH_DELIMITED,))

    def encode(self, message: Message | Chunk) -> bytes:
        """A message, serialised."""
        if isinstance(message, Chunk):
            return b"".join((self._head, encode_varint(len(message.chunk)), message.chunk))
        return message.SerializeToString()

    def decode(self, received: bytes) -> Any:
        """A message of the type; a `Chunk`, without a copy, where that is all there is. Raises DecodeError."""
        # A tag below 16 takes one byte, a length that a message may have four.
        if received[:1] == self._head:
            size = 0
            for place, byte in enumerate(received[1:5]):
                size |= (byte & 0x7F) << 7 * place
                if byte < 0x80:
                    if place + 2 + size == len(received):
                        return Chunk(memoryview(received)[place + 2 :])
                    break
        # Anything else, however it is encoded, is protobuf's.
        return self._parse(received)


UPLOADED = ChunkCodec(artifact_pb2.UploadArtifactRequest)
DOWNLOADED = ChunkCodec(artifact_pb2.DownloadArtifactResponse)


class ArtifactStub(_GeneratedStub):
    """The generated stub of ArtifactService, and beside it the two methods with chunks as `Chunk`s."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        super().__init__(channel)
        self.upload_chunks: Any = channel.stream_unary(
            f"/{SERVICE}/{UPLOAD}",
            request_serializer=UPLOADED.encode,
            response_deserializer=artifact_pb2.UploadArtifactResponse.FromString,
        )
        self.download_chunks: Any = channel.unary_stream(
            f"/{SERVICE}/{DOWNLOAD}",
            request_serializer=artifact_pb2.DownloadArtifactRequest.SerializeToString,
            response_deserializer=DOWNLOADED.decode,
        )


def add_to_server(servicer: artifact_pb2_grpc.ArtifactServiceServicer, server: grpc.aio.Server) -> None:
    """Serves ArtifactService as the generated function does; where messages hold a chunk it gets and gives `Chunk`s."""
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(servicer, server)
    # In place of the generated two.
    server.add_registered_method_handlers(
        SERVICE,
        {
            UPLOAD: grpc.stream_unary_rpc_method_handler(
                servicer.UploadArtifact,
                request_deserializer=UPLOADED.decode,
                response_serializer=artifact_pb2.UploadArtifactResponse.SerializeToString,
            ),
            DOWNLOAD: grpc.unary_stream_rpc_method_handler(
                servicer.DownloadArtifact,
                request_deserializer=artifact_pb2.DownloadArtifactRequest.FromString,
                response_serializer=DOWNLOADED.encode,
            ),
        },
    )
