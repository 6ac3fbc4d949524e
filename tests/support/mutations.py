"""Random changes of valid requests: of fields by their descriptors, of signed statements, of serialised bytes."""

import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from tiltyard.identity import Key
from tiltyard.statements import PAYLOAD_TYPES, sign_statement
from tiltyard.type.v1 import envelope_pb2

STATEMENTS = {kind: message for message, kind in PAYLOAD_TYPES.items()}
_MAX_DEPTH = 6

_TEXTS = (
    "",
    " ",
    "\x00",
    "a\x00b",
    "\u202eevil",
    "%s%n",
    "../../../etc/passwd",
    "tasks/",
    "tasks/*",
    "tasks/-",
    "'; DROP TABLE participants; --",
    "é" * 64,
    "\U0001f600",
    "a" * 63,
    "a" * 10_000,
    "-1",
    "NaN",
    "state = OPEN AND (",
    'state = "OPEN" AND create_time > 2026-01-01T00:00:00Z',
    "display_name",
    "config.submission_limit,config.no_such_field",
    "{}",
    "\ufeff",
)
_INTEGERS = (0, 1, -1, 2, 7, 63, 64, 255, 1000, 1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 31, 1 << 53)
_LARGE_INTEGERS = ((1 << 63) - 1, -(1 << 63), 253402300799, 253402300800, -62135596801, 10**18)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
_SIZES = (0, 1, 15, 31, 32, 33, 48, 64, 96, 1000)


class Mutator:
    """Makes mutants. `names` are texts that name something; one `seed` gives the same mutants each time."""

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self._texts = (*_TEXTS, *names, *names, *names)

    def mutant(self, message: Message, key: Key) -> bytes:
        """A changed `message`, serialised; statements within may be changed and signed again by `key`."""
        copy = type(message)()
        copy.CopyFrom(message)
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self._change(copy, key, 0)
        raw = copy.SerializeToString()
        return self._damage(raw) if self.random.random() < 0.2 else raw

    def _change(self, message: Message, key: Key, depth: int) -> None:
        if isinstance(message, envelope_pb2.Envelope) and self.random.random() < 0.6:
            self._change_statement(message, key, depth)
            return
        fields = message.DESCRIPTOR.fields
        if not fields:
            return
        # What is set matters most.
        present = [field for field, _ in message.ListFields()]
        field = self.random.choice(present if present and self.random.random() < 0.7 else list(fields))
        if field.is_repeated:
            self._change_repeated(message, field, key, depth)
        elif field.message_type is not None:
            if self.random.random() < 0.15:
                message.ClearField(field.name)
            elif depth < _MAX_DEPTH:
                inner = getattr(message, field.name)
                inner.SetInParent()
                self._change(inner, key, depth + 1)
        elif self.random.random() < 0.1:
            message.ClearField(field.name)
        else:
            setattr(message, field.name, self._value(field, getattr(message, field.name)))

    def _change_statement(self, envelope: envelope_pb2.Envelope, key: Key, depth: int) -> None:
        kind = STATEMENTS.get(envelope.payload_type) or self.random.choice(list(STATEMENTS.values()))
        statement = kind()
        try:
            statement.ParseFromString(envelope.payload)
        except DecodeError:
            return
        self._change(statement, key, depth + 1)
        envelope.CopyFrom(sign_statement(key, statement))

    def _change_repeated(self, message: Message, field: FieldDescriptor, key: Key, depth: int) -> None:
        values = getattr(message, field.name)
        choice = self.random.random()
        if choice < 0.2:
            message.ClearField(field.name)
            return
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            value = values[self._value(entry.fields_by_name["key"], None)]
            if isinstance(value, Message) and depth < _MAX_DEPTH:
                self._change(value, key, depth + 1)
            return
        if entry is not None:
            if choice < 0.5 and len(values) and depth < _MAX_DEPTH:
                self._change(self.random.choice(values), key, depth + 1)
            else:
                for _ in range(self.random.choice((1, 1, 2, 300))):
                    added = values.add()
                    if len(values) > 1:
                        added.CopyFrom(values[0])
            return
        values.extend(self._value(field, None) for _ in range(self.random.choice((1, 1, 2, 500))))

    def _value(self, field: FieldDescriptor, before: Any) -> Any:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                if before and self.random.random() < 0.5:
                    return self._damage(before)
                return self.random.randbytes(self.random.choice(_SIZES))
            if before and self.random.random() < 0.3:
                at = self.random.randrange(len(before))
                return before[:at] + self.random.choice(("", "/", "0", "\u00df", "A", " ")) + before[at + 1 :]
            return self.random.choice(self._texts)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.random.random() < 0.5
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            assert field.enum_type is not None
            return self.random.choice([*(value.number for value in field.enum_type.values), 99, -1, (1 << 31) - 1])
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return self.random.choice(_FLOATS)
        bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
        signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        return min(max(self.random.choice(_INTEGERS + _LARGE_INTEGERS), low), high)

    def _damage(self, raw: bytes) -> bytes:
        """Some bytes changed, cut out, doubled or cut off."""
        damaged = bytearray(raw)
        for _ in range(self.random.choice((1, 1, 2, 5))):
            if not damaged:
                return self.random.randbytes(self.random.choice((1, 3, 20)))
            at, length = self.random.randrange(len(damaged)), self.random.choice((1, 2, 8))
            choice = self.random.randrange(5)
            if choice == 0:
                damaged[at] ^= 1 << self.random.randrange(8)
            elif choice == 1:
                damaged[at : at + length] = self.random.randbytes(length)
            elif choice == 2:
                del damaged[at : at + length]
            elif choice == 3:
                damaged[at:at] = damaged[at : at + length]
            else:
                del damaged[at:]
        return bytes(damaged)
