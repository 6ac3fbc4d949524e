"""Signs and opens statements: messages inside DSSE envelopes, each kind under a payload type of its own."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tiltyard.identity import Envelope, InvalidSignature, Key, sign_envelope, verify_envelope
from tiltyard.type.v1 import envelope_pb2

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "PAYLOAD_TYPES",
    "STATEMENT_KINDS",
    "InvalidSignature",
    "open_statement",
    "sign_statement",
]

MAX_PAYLOAD_BYTES = 64 * 1024

M = TypeVar("M", bound=Message)

STATEMENT_KINDS: Mapping[str, type[Message]] = MappingProxyType(
    {
        "join": envelope_pb2.JoinStatement,
        "submission-commit": envelope_pb2.CommitStatement,
        "submission-reveal": envelope_pb2.RevealStatement,
        "evaluation-seal": envelope_pb2.SealStatement,
        "evaluation-report": envelope_pb2.EvaluationReport,
        "endorsement": envelope_pb2.EndorsementStatement,
        "owner": envelope_pb2.OwnerStatement,
    }
)
"""What can be signed, by the statement's kebab-case name."""

PAYLOAD_TYPES: Mapping[type[Message], str] = MappingProxyType(
    {message: f"application/vnd.tiltyard.{kind}.v1+protobuf" for kind, message in STATEMENT_KINDS.items()}
)
"""The payload type of each kind of statement, as protos/tiltyard/type/v1/envelope.proto fixes it."""


def sign_statement(key: Key, statement: Message) -> envelope_pb2.Envelope:
    """The statement in a signed envelope. Raises KeyError for a message that is no statement."""
    envelope = sign_envelope(key, PAYLOAD_TYPES[type(statement)], statement.SerializeToString(deterministic=True))
    return envelope_pb2.Envelope(
        payload_type=envelope.payload_type,
        payload=envelope.payload,
        signature=envelope.signature,
        public_key=envelope.public_key,
    )


def open_statement(envelope: envelope_pb2.Envelope, expected: type[M]) -> tuple[M, str]:
    """The statement of type `expected` in the envelope, and the participant id of who signed it.

    Raises InvalidSignature (bad key or signature, another payload type) or ValueError (over 64 KiB, not a message of
    the type, or one with a field twice or with a value that need not be written), each saying what is wrong. Who the
    signer must be is the caller's to check.
    """
    if len(envelope.payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"payload has {len(envelope.payload)} bytes, at most {MAX_PAYLOAD_BYTES} are allowed")
    signer = verify_envelope(
        Envelope(envelope.payload_type, envelope.payload, envelope.signature, envelope.public_key),
        payload_type=PAYLOAD_TYPES[expected],
    )
    statement = expected()
    try:
        statement.ParseFromString(envelope.payload)
    except DecodeError as error:
        raise ValueError(f"payload is not a {expected.DESCRIPTOR.name}") from error
    # A field that stands there twice is read in one way by some languages and in another by others.
    if statement.ByteSize() != len(envelope.payload):
        raise ValueError(
            f"payload has {len(envelope.payload)} bytes, and what it says as {expected.DESCRIPTOR.name} takes "
            f"{statement.ByteSize()}"
        )
    return statement, signer
