"""Signed statements: kept as they came, and opened only for those they are about."""

from typing import TypeVar

from google.protobuf.message import Message

from services.runtime.errors import InvalidArgument
from tiltyard import statements
from tiltyard.identity import Envelope
from tiltyard.statements import InvalidSignature
from tiltyard.type.v1 import envelope_pb2

M = TypeVar("M", bound=Message)

# The longest statement, a report with 500 characters of detail, has less. What is unknown here would stay, too.
MAX_PAYLOAD_BYTES = 4096


def envelope(message: envelope_pb2.Envelope) -> Envelope:
    """The domain's envelope with the same four fields."""
    return Envelope(message.payload_type, message.payload, message.signature, message.public_key)


def envelope_message(kept: Envelope) -> envelope_pb2.Envelope:
    """The contract's envelope with the same four fields."""
    return envelope_pb2.Envelope(
        payload_type=kept.payload_type, payload=kept.payload, signature=kept.signature, public_key=kept.public_key
    )


def open_statement(
    message: envelope_pb2.Envelope, expected: type[M], *, origin: str, field: str = "statement"
) -> tuple[M, str]:
    """The statement inside, signed for this arena, and its signer's participant id. Raises InvalidArgument."""
    if not message.payload:
        raise InvalidArgument.field(field, "is required")
    if len(message.payload) > MAX_PAYLOAD_BYTES:
        description = f"has {len(message.payload)} bytes, at most {MAX_PAYLOAD_BYTES} are allowed"
        raise InvalidArgument.field(f"{field}.payload", description, reason="INVALID_STATEMENT")
    try:
        statement, signer = statements.open_statement(message, expected)
    except InvalidSignature as error:
        raise InvalidArgument.field(field, str(error), reason="INVALID_STATEMENT") from None
    except ValueError as error:
        raise InvalidArgument.field(f"{field}.payload", str(error), reason="INVALID_STATEMENT") from None
    named = statement.origin  # type: ignore[attr-defined]  # every statement has one
    if named != origin:
        raise InvalidArgument.field(
            f"{field}.origin", f"is {named[:100]!r}, this arena is {origin!r}", reason="INVALID_STATEMENT"
        )
    return statement, signer


def open_own_statement(
    message: envelope_pb2.Envelope, expected: type[M], *, origin: str, caller: str, field: str = "statement"
) -> M:
    """A statement that the caller itself signed. Raises InvalidArgument."""
    statement, signer = open_statement(message, expected, origin=origin, field=field)
    if signer != caller:
        raise InvalidArgument.field(field, "is signed by somebody else than the caller", reason="INVALID_STATEMENT")
    return statement
