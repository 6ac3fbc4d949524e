"""A witness of a record log: it remembers what it has seen, checks that the log only grows, and cosigns.

Its folder holds `witness.pem` (its key), `witness.pub` (its verifier key), `frontier.json` (the tree it has seen), one
cosigned note for each size under `checkpoints/`, and what it has found wrong under `alarms/`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from google.protobuf.message import DecodeError

from tiltyard.audit.record import InvalidRecord
from tiltyard.cosigning import WitnessKey, cosign, verify_cosignature
from tiltyard.foldersync import sync_folder
from tiltyard.identity import Key
from tiltyard.transparency import (
    Checkpoint,
    Frontier,
    InvalidNote,
    leaf_hash,
    parse_checkpoint,
    verify_consistency,
    verify_note,
)
from tiltyard.type.v1 import log_pb2

_NAME = "witness"


class Alarm(Exception):
    """A log that has rewritten its history, or shows two of them."""


class LogSource(Protocol):
    """Where the log is read from."""

    async def note(self) -> str:
        """The present checkpoint."""
        ...

    async def leaves(self, *, start: int, end: int) -> Sequence[bytes]:
        """Leaves as they were hashed. Raises InvalidRecord when not all of them are shown."""
        ...

    async def consistency(self, *, old_size: int, new_size: int) -> Sequence[bytes]:
        """The proof that one size is a beginning of the other."""
        ...


@dataclass(frozen=True)
class Seen:
    """The log at the size that the witness has seen last."""

    origin: str
    log_key: bytes
    frontier: Frontier


class Witness:
    """One folder's witness. It trusts the log key that it has seen first, or was told."""

    def __init__(self, folder: Path, *, name: str = "") -> None:
        if name:
            WitnessKey.check_name(name)
        self._folder = folder
        for each in (folder, folder / "checkpoints", folder / "alarms"):
            each.mkdir(parents=True, exist_ok=True)
        key_file, public = folder / f"{_NAME}.pem", folder / f"{_NAME}.pub"
        self._key = Key.load(key_file) if key_file.exists() else Key.generate()
        if not key_file.exists():
            self._key.save(key_file)
        if not public.exists():
            named = WitnessKey(name or f"witness-{self._key.id[:12]}", self._key.public_bytes)
            public.write_text(f"{named}\n", encoding="utf-8")
        self.public = WitnessKey.parse(public.read_text(encoding="utf-8"))

    def seen(self) -> Seen | None:
        """What is remembered; None before the first look. Raises ValueError for a file that was damaged."""
        file = self._folder / "frontier.json"
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            hashes = [bytes.fromhex(each) for each in kept["hashes"]]
            return Seen(kept["origin"], bytes.fromhex(kept["log_key"]), Frontier(kept["size"], hashes))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error

    async def look(self, source: LogSource, *, now_s: int) -> Checkpoint:
        """Looks at the log once: its signature, that it has grown from what was seen, and that its new leaves give its
        root. Then cosigns. Raises Alarm, with both notes kept, InvalidNote, and ValueError as `seen` does."""
        # First, since it says at once whether the registry is there: leaves are asked for with patience.
        note = await source.note()
        seen = self.seen() or await _begin(source)
        checkpoint = parse_checkpoint(verify_note(note, name=seen.origin, public_key=seen.log_key))
        frontier = seen.frontier
        if checkpoint.size < frontier.size:
            self._raise(note, f"the log had {frontier.size} leaves and shows {checkpoint.size}: leaves are gone")
        if frontier.size:
            path = await source.consistency(old_size=frontier.size, new_size=checkpoint.size)
            grown = verify_consistency(
                old_size=frontier.size,
                new_size=checkpoint.size,
                path=path,
                old_root=frontier.root(),
                new_root=checkpoint.root,
            )
            if not grown:
                self._raise(note, f"the log of {checkpoint.size} leaves does not begin with the {frontier.size} seen")
        try:
            leaves = await source.leaves(start=frontier.size, end=checkpoint.size)
        except InvalidRecord as error:
            self._raise(note, str(error))
        for leaf in leaves:
            frontier.append(leaf_hash(leaf))
        if (frontier.size, frontier.root()) != (checkpoint.size, checkpoint.root):
            self._raise(note, f"the leaves that the log shows up to {checkpoint.size} do not give its root")
        self._keep(note, Seen(seen.origin, seen.log_key, frontier), now_s)
        return checkpoint

    async def compare(self, source: LogSource, other: str) -> Checkpoint:
        """Holds a checkpoint that somebody else was shown against this log. Raises Alarm for another history."""
        seen = self.seen()
        if seen is None:
            raise InvalidNote("this witness has not looked at the log yet")
        theirs = parse_checkpoint(verify_note(other, name=seen.origin, public_key=seen.log_key))
        if theirs.size > seen.frontier.size:
            # It may have grown since it was looked at.
            note = verify_note(await source.note(), name=seen.origin, public_key=seen.log_key)
            shown = parse_checkpoint(note).size
            if theirs.size > shown:
                self._raise(other, f"the log has signed {theirs.size} leaves and shows {shown}")
        small, large = sorted(((theirs.size, theirs.root), (seen.frontier.size, seen.frontier.root())))
        path = await source.consistency(old_size=small[0], new_size=large[0]) if small[0] != large[0] else []
        same = verify_consistency(old_size=small[0], new_size=large[0], path=path, old_root=small[1], new_root=large[1])
        if not same:
            self._raise(other, f"the log has signed two histories: one of {small[0]} and one of {large[0]} leaves")
        return theirs

    def _keep(self, note: str, seen: Seen, now_s: int) -> None:
        size = seen.frontier.size
        file = self._folder / "checkpoints" / f"{size:012}"
        if not file.exists():
            _replace(file, cosign(note, key=self._key, name=self.public.name, time_s=now_s))
        kept = {
            "origin": seen.origin,
            "log_key": seen.log_key.hex(),
            "size": size,
            "hashes": [each.hex() for each in seen.frontier.hashes],
        }
        _replace(self._folder / "frontier.json", json.dumps(kept) + "\n")

    def _raise(self, note: str, reason: str) -> NoReturn:
        seen = self.seen()
        known = self._folder / "checkpoints" / f"{seen.frontier.size if seen else 0:012}"
        before = known.read_text(encoding="utf-8") if known.exists() else ""
        count = sum(1 for _ in (self._folder / "alarms").iterdir())
        evidence = f"{reason}\n\nseen before:\n{before}\nshown now:\n{note}"
        _replace(self._folder / "alarms" / f"{count + 1:06}.txt", evidence)
        raise Alarm(reason)


@dataclass(frozen=True)
class Testimony:
    """What a witness says of a log: how far it has seen it, and when."""

    name: str
    size: int
    time_s: int


def witnessed(folder: Path, *, leaf_hashes: Sequence[bytes], log_key: bytes, origin: str) -> Testimony | None:
    """The newest cosigned checkpoint in a witness's folder that is not beyond these leaves; None where there is none.

    Raises Alarm when the leaves give another root than the one that was cosigned, with the leaves among which the
    difference lies; InvalidNote, OSError, ValueError.
    """
    witness = WitnessKey.parse((folder / f"{_NAME}.pub").read_text(encoding="utf-8"))
    frontier, known = Frontier(), None
    for file in sorted((folder / "checkpoints").glob("[0-9]*")):
        note = file.read_text(encoding="utf-8")
        checkpoint = parse_checkpoint(verify_note(note, name=origin, public_key=log_key))
        time_s = verify_cosignature(note, witness)
        if checkpoint.size > len(leaf_hashes):
            break
        begin = frontier.size
        for each in leaf_hashes[begin : checkpoint.size]:
            frontier.append(each)
        if frontier.root() != checkpoint.root:
            raise Alarm(f"{witness.name} saw another history: a leaf from {begin} to {checkpoint.size - 1} was changed")
        known = Testimony(witness.name, checkpoint.size, time_s)
    return known


async def _begin(source: LogSource) -> Seen:
    """The first look: the genesis names the log's key. Raises InvalidNote: there is no log yet that could have lied."""
    try:
        leaves = await source.leaves(start=0, end=1)
        genesis = log_pb2.LogEntry.FromString(leaves[0]).genesis if leaves else log_pb2.Genesis()
    except InvalidRecord as error:
        raise InvalidNote(str(error)) from error
    except DecodeError as error:
        raise InvalidNote("leaf 0 is not the genesis") from error
    if not genesis.origin:
        raise InvalidNote("leaf 0 is not the genesis")
    return Seen(genesis.origin, genesis.log_key, Frontier())


def _replace(file: Path, text: str) -> None:
    """Writes a file whole or not at all, also through a crash; once this returns, a loss of power takes it no more."""
    beside = file.with_name(f".{file.name}.new")
    with beside.open("w", encoding="utf-8") as written:
        written.write(text)
        written.flush()
        os.fsync(written.fileno())
    beside.replace(file)
    sync_folder(file.parent)
