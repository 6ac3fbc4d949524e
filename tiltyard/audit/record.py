"""A record log as it was downloaded, and the folder that keeps it: a signed checkpoint and the bytes of every leaf."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from google.protobuf.message import DecodeError

from tiltyard.type.v1 import draw_pb2, log_pb2

CHECKPOINT_FILE = "checkpoint"
LEAVES_FILE = "leaves"

_LENGTH_BYTES = 4


class InvalidRecord(ValueError):
    """What was read is no record log."""


@dataclass(frozen=True)
class Record:
    """A signed note over the tree, and the leaves in order as they were hashed."""

    note: str
    leaves: tuple[bytes, ...]

    @cached_property
    def entries(self) -> tuple[log_pb2.LogEntry, ...]:
        """The leaves read. Raises InvalidRecord, naming the leaf that is no entry."""
        return tuple(_entry(index, leaf) for index, leaf in enumerate(self.leaves))

    @property
    def genesis(self) -> log_pb2.Genesis:
        """Leaf 0. Raises InvalidRecord when it is something else."""
        if not self.entries or self.entries[0].WhichOneof("entry") != "genesis":
            raise InvalidRecord("leaf 0 is not the genesis")
        return self.entries[0].genesis

    def of_kind(self, kind: str) -> Iterator[tuple[int, log_pb2.LogEntry]]:
        """Entries of one kind with their indices."""
        return ((index, entry) for index, entry in enumerate(self.entries) if entry.WhichOneof("entry") == kind)

    def draws(self) -> list[draw_pb2.DrawReceipt]:
        """The last receipt of each draw."""
        return list({entry.draw.draw: entry.draw for _, entry in self.of_kind("draw")}.values())


def write_record(record: Record, folder: Path) -> None:
    """Writes `checkpoint`, the note as it came, and `leaves`, each after its length in four big-endian bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEAVES_FILE).write_bytes(pack_leaves(record.leaves))
    (folder / CHECKPOINT_FILE).write_bytes(record.note.encode())


def read_record(folder: Path) -> Record:
    """Reads what `write_record` wrote. Raises InvalidRecord for any other file or byte, OSError."""
    names, wanted = {each.name for each in folder.iterdir()}, {CHECKPOINT_FILE, LEAVES_FILE}
    if missing := sorted(wanted - names):
        raise InvalidRecord(f"{folder} is no exported record log: it holds no {' and no '.join(missing)}")
    if others := sorted(names - wanted):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InvalidRecord(f"{folder} holds {others[0]}{more}, not checkpoint and leaves alone")
    try:
        note = (folder / CHECKPOINT_FILE).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InvalidRecord("the checkpoint is not UTF-8 text") from error
    return Record(note, unpack_leaves((folder / LEAVES_FILE).read_bytes()))


def pack_leaves(leaves: Sequence[bytes]) -> bytes:
    """Leaves one after the other, each after its length in four big-endian bytes."""
    return b"".join(len(leaf).to_bytes(_LENGTH_BYTES, "big") + leaf for leaf in leaves)


def unpack_leaves(packed: bytes) -> tuple[bytes, ...]:
    """The reverse of `pack_leaves`. Raises InvalidRecord when the last leaf is cut short."""
    leaves: list[bytes] = []
    at = 0
    while at < len(packed):
        begin = at + _LENGTH_BYTES
        end = begin + int.from_bytes(packed[at:begin], "big")
        if begin > len(packed) or end > len(packed):
            raise InvalidRecord(f"leaf {len(leaves)} is cut short")
        leaves.append(packed[begin:end])
        at = end
    return tuple(leaves)


def _entry(index: int, leaf: bytes) -> log_pb2.LogEntry:
    try:
        entry = log_pb2.LogEntry.FromString(leaf)
    except DecodeError as error:
        raise InvalidRecord(f"leaf {index} is not a LogEntry") from error
    # A field that stands there twice is read in one way by some languages and in another by others.
    if entry.ByteSize() != len(leaf):
        raise InvalidRecord(
            f"leaf {index} is not a LogEntry: it has {len(leaf)} bytes, and what it says takes {entry.ByteSize()}"
        )
    return entry
