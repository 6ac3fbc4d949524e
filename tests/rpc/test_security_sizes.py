"""Requests as large as a message may be, each by one field of it: none holds a server for long."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.support.asked_arena import ENDING, Asked, arena_in
from tests.support.mutations import STATEMENTS
from tiltyard.identity import Key
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2

MAX_BYTES = 4 * 1024 * 1024
LARGE = 3_300_000
# A message of four megabytes takes a tenth of it to decode, and a machine has other things to do.
AT_MOST_CPU_S = 2.0
_MAX_DEPTH = 5
_TEXTS = ("a" * LARGE, "(" * LARGE, 'state="' + "\\" * LARGE, "a=1 AND " * (LARGE // 8), "9" * LARGE, "/" * LARGE)


def enlarged(message: Message, key: Key, depth: int = 0, way: str = "") -> Iterator[str]:
    """Makes one field after the other as large as it may be, in statements signed anew, too; its name each time."""
    kept = type(message)()
    kept.CopyFrom(message)
    for descriptor in message.DESCRIPTOR.fields:
        name = f"{way}.{descriptor.name}"
        for _ in _values(message, descriptor):
            yield name
        message.CopyFrom(kept)
        if descriptor.message_type is None or depth == _MAX_DEPTH or _is_map(descriptor):
            continue
        field: Any = getattr(message, descriptor.name)
        inner = (field[0] if len(field) else field.add()) if descriptor.is_repeated else field
        inner.SetInParent()
        if isinstance(inner, envelope_pb2.Envelope) and inner.payload_type in STATEMENTS:
            statement = STATEMENTS[inner.payload_type]()
            statement.ParseFromString(inner.payload)
            for each in enlarged(statement, key, depth + 1, f"{name} signed"):
                if statement.ByteSize() < MAX_BYTES:
                    inner.CopyFrom(sign_statement(key, statement))
                    yield each
        yield from enlarged(inner, key, depth + 1, name)
        message.CopyFrom(kept)


def _values(message: Message, descriptor: FieldDescriptor) -> Iterator[None]:
    """Sets the field to each of its large values."""
    if _is_map(descriptor):
        return
    if not descriptor.is_repeated:
        large: dict[int, tuple[Any, ...]] = {
            FieldDescriptor.TYPE_STRING: _TEXTS,
            FieldDescriptor.TYPE_BYTES: (b"\x0a" * LARGE,),
        }
        for value in large.get(descriptor.type, ()):
            setattr(message, descriptor.name, value)
            yield
        return
    field: Any = getattr(message, descriptor.name)
    if descriptor.message_type is not None:
        one = descriptor.message_type._concrete_class() if not len(field) else field[0]
        elements = [[one] * min(400_000, LARGE // (one.ByteSize() + 3))]
    elif descriptor.type == FieldDescriptor.TYPE_STRING:
        elements = [["a"] * 600_000, [f"participants/{'a' * 40}"] * 60_000]
    elif descriptor.type == FieldDescriptor.TYPE_BYTES:
        elements = [[b"a"] * 600_000]
    else:
        elements = [[1] * 1_500_000, [(1 << 31) - 1] * 600_000]
    for each in elements:
        del field[:]
        field.extend(each)
        yield


def _is_map(descriptor: FieldDescriptor) -> bool:
    return descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry


async def test_no_large_request_holds_a_server(tmp_path: Path) -> None:
    slow, number = [], 0
    async with arena_in(tmp_path) as arena:
        asked = Asked(arena)
        await asked.send_valid()
        for path in sorted(asked.methods, key=lambda path: path.rpartition("/")[2] in ENDING):
            server, who, valid = asked.seeds[path]
            message = type(valid)()
            message.CopyFrom(valid)
            for field in enlarged(message, arena.keys[who]):
                if message.ByteSize() >= MAX_BYTES:
                    continue
                number += 1
                raw = message.SerializeToString()
                before = time.process_time()
                code = await asked.send(path, server, who, [raw])
                if (spent_s := time.process_time() - before) > AT_MOST_CPU_S:
                    slow.append((path, field, code, spent_s))
        await asked.close()
    assert number > 1000
    assert not slow
