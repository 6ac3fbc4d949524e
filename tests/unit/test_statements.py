"""Statements: what is signed, by whom, and what is refused."""

import pytest

from tiltyard.identity import Envelope, InvalidSignature, Key, sign_envelope
from tiltyard.statements import MAX_PAYLOAD_BYTES, PAYLOAD_TYPES, STATEMENT_KINDS, open_statement, sign_statement
from tiltyard.type.v1 import draw_pb2, envelope_pb2, participation_pb2


def as_message(envelope: Envelope) -> envelope_pb2.Envelope:
    return envelope_pb2.Envelope(
        payload_type=envelope.payload_type,
        payload=envelope.payload,
        signature=envelope.signature,
        public_key=envelope.public_key,
    )


def join_statement(key: Key) -> envelope_pb2.JoinStatement:
    return envelope_pb2.JoinStatement(
        origin="tiltyard.test",
        task="tasks/digits",
        participant=f"participants/{key.id}",
        role=participation_pb2.ROLE_VALIDATOR,
    )


def test_a_statement_comes_back_with_its_signer() -> None:
    key = Key.generate()
    statement, signer = open_statement(sign_statement(key, join_statement(key)), envelope_pb2.JoinStatement)
    assert statement == join_statement(key)
    assert signer == key.id


def test_signing_twice_gives_the_same_bytes() -> None:
    key = Key.generate()
    assert sign_statement(key, join_statement(key)) == sign_statement(key, join_statement(key))


def test_every_statement_of_the_contract_has_a_payload_type_of_its_own() -> None:
    named = {name for name in envelope_pb2.DESCRIPTOR.message_types_by_name if name != "Envelope"}
    assert {message.DESCRIPTOR.name for message in PAYLOAD_TYPES} == named
    assert len(set(PAYLOAD_TYPES.values())) == len(named)


@pytest.mark.parametrize("kind", STATEMENT_KINDS)
def test_payload_types_follow_the_contract(kind: str) -> None:
    assert PAYLOAD_TYPES[STATEMENT_KINDS[kind]] == f"application/vnd.tiltyard.{kind}.v1+protobuf"


def test_one_kind_is_never_read_as_another() -> None:
    key = Key.generate()
    envelope = sign_statement(key, envelope_pb2.CommitStatement(origin="tiltyard.test"))
    with pytest.raises(InvalidSignature, match="payload type"):
        open_statement(envelope, envelope_pb2.RevealStatement)


@pytest.mark.parametrize("field", ["payload", "signature", "public_key"])
def test_a_changed_byte_is_found(field: str) -> None:
    envelope = sign_statement(Key.generate(), envelope_pb2.JoinStatement(origin="tiltyard.test"))
    changed = bytearray(getattr(envelope, field))
    changed[-1] ^= 1
    setattr(envelope, field, bytes(changed))
    with pytest.raises(InvalidSignature):
        open_statement(envelope, envelope_pb2.JoinStatement)


def test_signed_bytes_that_are_no_statement_are_refused() -> None:
    kind = PAYLOAD_TYPES[envelope_pb2.JoinStatement]
    with pytest.raises(ValueError, match="not a JoinStatement"):
        open_statement(as_message(sign_envelope(Key.generate(), kind, b"\xff\xff")), envelope_pb2.JoinStatement)


def test_payloads_are_bounded() -> None:
    kind = PAYLOAD_TYPES[envelope_pb2.JoinStatement]
    envelope = as_message(sign_envelope(Key.generate(), kind, bytes(MAX_PAYLOAD_BYTES + 1)))
    with pytest.raises(ValueError, match="at most 65536"):
        open_statement(envelope, envelope_pb2.JoinStatement)


def test_only_statements_are_signed() -> None:
    with pytest.raises(KeyError):
        sign_statement(Key.generate(), draw_pb2.Pick())


def test_a_statement_that_some_read_otherwise_is_refused() -> None:
    key = Key.generate()
    kind = PAYLOAD_TYPES[envelope_pb2.EvaluationReport]
    # Counts twice: protobuf merges them, and others take the second.
    report = b"\x2a\x02\x08\x05" + b"\x2a\x02\x10\x0a"
    assert envelope_pb2.EvaluationReport.FromString(report).counts.total == 10
    with pytest.raises(ValueError, match="what it says as EvaluationReport takes 6"):
        open_statement(as_message(sign_envelope(key, kind, report)), envelope_pb2.EvaluationReport)


def test_what_a_later_client_says_is_signed_with_the_rest() -> None:
    key = Key.generate()
    payload = join_statement(key).SerializeToString() + b"\xa0\x06\x01"
    envelope = as_message(sign_envelope(key, PAYLOAD_TYPES[envelope_pb2.JoinStatement], payload))
    statement, _ = open_statement(envelope, envelope_pb2.JoinStatement)
    assert statement.SerializeToString() == payload
