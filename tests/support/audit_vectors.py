"""The vectors of audits: two logs, what is changed in them, and what every language has to find then.

`python -m tests.support.audit_vectors` writes tests/vectors/audit/cases.json for the logs that lie beside it; with
`--tell` these are told anew first. The log's key is not needed for a case: that the note does not fit any more is found
with the rest.
"""

import asyncio
import base64
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.support.registry_server import RegistryServer
from tests.support.registry_world import key_of
from tests.support.told_arena import tell_tasks
from tests.support.told_lies import LIES, Entry, amendment_of, event, first, setting
from tests.support.told_log import ToldLog, named
from tests.support.told_names import NAMELESS, strangers
from tiltyard.audit import Audit, Record, audit, read_record, write_record
from tiltyard.registry.v1 import leaderboard_pb2
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2

FOLDER = Path(__file__).parent.parent / "vectors" / "audit"
CASES = FOLDER / "cases.json"
SUBMISSION, ARENA = "submission", "arena"

_ABOUT = (
    "Audits of the logs in the folders beside this file. Of a case: `changed` leaves by index and `added` ones at the "
    "end, in base64, indices that are `left_out`, a `note` in place of the log's own, and `shown` leaderboards. What "
    "comes out: `found` failures in order as claim and index, each once, how often each claim was `checked`, what is "
    "`pending`, since when in nanoseconds since 1970, and what is `hidden`."
)
_LATER = b"\xa0\x06\x01"
"""A field that no message has yet."""
_NODE = key_of("node 0")
_VALIDATORS = [key_of(f"validator {index}") for index in range(4)]


@dataclass
class Case:
    """What is done to a log."""

    name: str
    log: str
    changed: dict[int, bytes] = field(default_factory=dict)
    left_out: Sequence[int] = ()
    added: Sequence[bytes] = ()
    note: str | None = None
    shown: Sequence[leaderboard_pb2.Leaderboard] = ()

    def audit(self, record: Record) -> Audit:
        """What is found in the log after that."""
        changed = [self.changed.get(index, leaf) for index, leaf in enumerate(record.leaves)]
        kept = [leaf for index, leaf in enumerate(changed) if index not in self.left_out]
        note = record.note if self.note is None else self.note
        return audit(Record(note, (*kept, *self.added)), shown=self.shown)


def read_logs() -> dict[str, Record]:
    """The logs as they lie there."""
    return {name: read_record(FOLDER / name) for name in (SUBMISSION, ARENA)}


def read_case(document: Mapping[str, Any]) -> Case:
    """A case as it stands in the file."""
    return Case(
        document["name"],
        document["log"],
        {int(index): base64.b64decode(leaf) for index, leaf in document["changed"].items()},
        document["left_out"],
        [base64.b64decode(leaf) for leaf in document["added"]],
        document["note"],
        [json_format.ParseDict(board, leaderboard_pb2.Leaderboard()) for board in document["shown"]],
    )


def as_document(case: Case, found: Audit) -> dict[str, Any]:
    """A case as it stands in the file, with what is found."""
    return {
        "name": case.name,
        "log": case.log,
        "changed": {str(index): _base64(leaf) for index, leaf in case.changed.items()},
        "left_out": list(case.left_out),
        "added": [_base64(leaf) for leaf in case.added],
        "note": case.note,
        "shown": [json_format.MessageToDict(board) for board in case.shown],
        "found": [list(each) for each in dict.fromkeys((one.claim.name.lower(), one.index) for one in found.failures)],
        "checked": {check.claim.name.lower(): check.count for check in found.checks},
        "pending": found.pending,
        "pending_since_ns": None if found.pending_since_ns is None else str(found.pending_since_ns),
        "hidden": list(found.hidden),
    }


def _base64(leaf: bytes) -> str:
    return base64.b64encode(leaf).decode()


def _cases(records: Mapping[str, Record]) -> Iterator[Case]:
    submission, arena = records[SUBMISSION], records[ARENA]
    for name, record in records.items():
        yield Case(f"an honest log: {name}", name, shown=audit(record).leaderboards)
    yield from _fields(submission)
    yield from _kinds_left_out(submission)
    yield from _odd(submission)
    yield from _names(submission)
    yield from _rankings(submission)
    yield from _kept_back(submission)
    yield from _batches(arena)


def _fields(record: Record) -> Iterator[Case]:
    """The first leaf of each kind with one value changed, for every value in it but those in envelopes' payloads."""
    seen = set()
    for index, entry in enumerate(record.entries):
        kind = entry.WhichOneof("entry")
        if kind in seen:
            continue
        seen.add(kind)
        for path, changed in _mutants(entry, entry):
            yield Case(f"{index}, {path}", SUBMISSION, {index: changed.SerializeToString(deterministic=True)})


def _mutants(whole: Entry, message: Message, way: str = "") -> Iterator[tuple[str, Entry]]:
    """Copies of `whole`, each with one value of `message` within it changed."""
    for told, value in message.ListFields():
        path = f"{way}{told.name}"
        if told.is_repeated:
            inner = list(value)[:1] if told.message_type else []
            for each in inner:
                yield from _mutants(whole, each, f"{path}[0].")
            before = list(value)
            del value[:]
            yield f"no {path}", _copy(whole)
            value.extend(before)
        elif told.message_type:
            yield from _mutants(whole, value, f"{path}.")
        else:
            setattr(message, told.name, _another(told, value))
            yield path, _copy(whole)
            setattr(message, told.name, value)


def _copy(entry: Entry) -> Entry:
    copy = Entry()
    copy.CopyFrom(entry)
    return copy


def _another(told: FieldDescriptor, value: Any) -> Any:
    match value:
        case bool():
            return not value
        case str():
            return f"{value}x"
        case bytes():
            return bytes([value[0] ^ 1]) + value[1:]
    return value + 1


def _kinds_left_out(record: Record) -> Iterator[Case]:
    kinds = [entry.WhichOneof("entry") for entry in record.entries]
    for kind in dict.fromkeys(kinds):
        yield Case(f"without any {kind}", SUBMISSION, left_out=[at for at, each in enumerate(kinds) if each == kind])


def _odd(record: Record) -> Iterator[Case]:
    """Leaves and notes that are not as they should be at all."""
    last = len(record.leaves) - 1
    for name, leaf in {
        "no entry": b"",
        "bytes that are no message": b"\xff",
        "an entry of a kind to come": b"\xb2\x01\x00",
        "a genesis": record.leaves[0],
        "an event twice in one leaf": Entry(ledger_event={"sequence": 1}).SerializeToString() + b"\x92\x01\x00",
        "a default value": b"\x92\x01\x02\x08\x00",
        "a message that ends in another": b"\x92\x01\x01\x08\x05",
        "a text that is no UTF-8": b"\x92\x01\x03\x1a\x01\xff",
    }.items():
        yield Case(f"at the end {name}", SUBMISSION, added=[leaf])
    yield Case("what a later registry says of a leaf", SUBMISSION, {last: record.leaves[last] + _LATER})
    for name, wanted, change in (
        ("what a later registry says of a score", first("score_concluded"), _later("score_concluded.score")),
        ("what a later selector says of a draw", first("draw"), _later("draw")),
        ("a time that there is not", first("verdict"), setting("time.seconds", 10**15)),
        ("a verdict's time that there is not", first("verdict"), setting("verdict.decide_time.seconds", 10**15)),
        ("a draw's time that there is not", first("draw"), setting("draw.draw_time.nanos", -1)),
        ("an event's time that there is not", first("ledger_event"), setting("ledger_event.time.seconds", -(10**15))),
        ("an event without a time", first("ledger_event"), _cleared("ledger_event", "time")),
        ("an event of no kind", first("ledger_event"), setting("ledger_event.kind", 99)),
        ("a negative amount", first("ledger_event"), setting("ledger_event.amount_micros", -1)),
        ("a curve that there is not", first("task_created"), setting("task_created.config.selection.curve", 99)),
        ("an exponent too large", first("task_created"), setting("task_created.config.selection.alpha_millis", 1000)),
        ("no configuration", first("task_created"), _cleared("task_created", "config")),
        ("the logistic curve", first("task_created"), setting("task_created.config.selection.curve", 3)),
        ("a score by another outcome", first("score_concluded"), setting("score_concluded.score.outcome", 99)),
        ("a fault by another score", first("score_concluded"), setting("score_concluded.score.fault", 99)),
        ("a score that is kept back", first("score_concluded"), _cleared("score_concluded", "score")),
        ("a short salt", first("evaluation_opened"), setting("evaluation_opened.salt", b"x")),
        ("a draw of a third round", first("draw"), setting("draw.round", 3)),
        ("another model", first("submission_revealed"), _revealing(bytes(32))),
        ("no model", first("submission_revealed"), _revealing(b"")),
        ("no statement", first("submission_committed"), _cleared("submission_committed", "statement")),
    ):
        yield _changed(name, record, SUBMISSION, wanted, change)
    offered = _copy(next(entry for entry in record.entries if entry.WhichOneof("entry") == "assignment_changed"))
    duty = offered.assignment_changed
    duty.assignment = duty.assignment.replace("/assignments/1-", "/assignments/01-")
    yield Case("a second name for a duty", SUBMISSION, added=[offered.SerializeToString(deterministic=True)])
    events = [entry for entry in record.entries if entry.WhichOneof("entry") == "ledger_event"]
    seated = _copy(next(entry for entry in events if entry.ledger_event.weight))
    seated.ledger_event.sequence = len(events) + 1
    yield Case("a second seat in a pool", SUBMISSION, added=[seated.SerializeToString(deterministic=True)])
    yield Case("no leaves", SUBMISSION, left_out=range(len(record.leaves)))
    for line in ("\u2014 x AAAA\n", "\u2014 x A\n", "x\n"):
        yield Case(f"a note with a further line, {line!r}", SUBMISSION, note=record.note + line)
    yield Case("a note without a signature", SUBMISSION, note=record.note.rpartition("\u2014")[0])


def _names(record: Record) -> Iterator[Case]:
    for name, (wanted, change) in NAMELESS.items():
        yield _changed(f"by no name: {name}", record, SUBMISSION, wanted, change)
    for name, entry in strangers(record.entries).items():
        yield Case(name, SUBMISSION, added=[entry.SerializeToString(deterministic=True)])


def _later(path: str) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        told: Message = entry
        for name in path.split("."):
            told = getattr(told, name)
        told.MergeFromString(_LATER)

    return change


def _revealing(model_digest: bytes) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        statement = entry.submission_revealed.statement
        reveal = envelope_pb2.RevealStatement.FromString(statement.payload)
        reveal.model_digest = model_digest
        statement.CopyFrom(sign_statement(_NODE, reveal))

    return change


def _cleared(kind: str, name: str) -> Callable[[Entry], None]:
    def change(entry: Entry) -> None:
        getattr(entry, kind).ClearField(name)

    return change


def _changed(
    name: str, record: Record, log: str, wanted: Callable[[Entry], bool], change: Callable[[Entry], None]
) -> Case:
    index, entry = next((at, each) for at, each in enumerate(record.entries) if wanted(each))
    copy = _copy(entry)
    change(copy)
    return Case(name, log, {index: copy.SerializeToString(deterministic=True)})


def _kept_back(record: Record) -> Iterator[Case]:
    """Ledger events that are not in the log, of a task that goes on and of one that is FINAL; a join that is not."""
    entries = record.entries
    charges = [at for at, entry in enumerate(entries) if entry.ledger_event.draw]
    joins = {entry.membership_changed.participant: at for at, entry in record.of_kind("membership_changed")}
    picks = next(record.of_kind("draw"))[1].draw.picks
    ends = _told_on(record, lambda told: told.end())
    yield Case("a final task", SUBMISSION, added=ends)
    for name, left_out in (("all charges", charges), ("the last charge", charges[-1:])):
        kept_back = [record.leaves[at] for at in left_out]
        yield Case(f"{name} kept back", SUBMISSION, left_out=left_out)
        yield Case(f"{name} kept back of a final task", SUBMISSION, left_out=left_out, added=ends)
        yield Case(f"{name} too late for a final task", SUBMISSION, left_out=left_out, added=[*ends, *kept_back])
    judged = range(next(record.of_kind("evaluation_sealed"))[0], len(entries))
    keys = {named(key): key for key in _VALIDATORS}
    drawn = [keys[pick.participant] for pick in picks]
    for name, refunded in (("all refunds", 3), ("a refund kept back", 2)):
        for end in ("", " of a final task"):

            def tell(told: ToldLog, refunded: int = refunded, end: str = end) -> None:
                told.give_up(drawn, refunded=refunded)
                if end:
                    told.end()

            yield Case(f"{name}{end}", SUBMISSION, left_out=judged, added=_told_on(record, tell))
    joined = joins[picks[0].participant]
    yield Case("a duty of somebody who has not joined", SUBMISSION, left_out=[joined])
    forged = _copy(entries[joined])
    forged.membership_changed.statement.CopyFrom(entries[joins[picks[1].participant]].membership_changed.statement)
    yield Case("a join by another's word", SUBMISSION, {joined: forged.SerializeToString(deterministic=True)})


def _told_on(record: Record, tell: Callable[[ToldLog], None]) -> Sequence[bytes]:
    """Leaves that follow a log's."""
    events = sum(entry.HasField("ledger_event") for entry in record.entries)
    told = ToldLog(leaves=list(record.leaves), events=events)
    tell(told)
    return told.leaves[len(record.leaves) :]


def _rankings(record: Record) -> Iterator[Case]:
    for name, value in (("rank", 2), ("correct", 9), ("display_name", "x"), ("interval_low", 0.5), ("submission", "x")):
        board = audit(record).leaderboards[0]
        setattr(board.entries[0], name, value)
        yield Case(f"a ranking with another {name}", SUBMISSION, shown=[board])
    yield Case("a ranking that is final", SUBMISSION, shown=[leaderboard_pb2.Leaderboard(task="tasks/t", final=True)])
    yield Case("a ranking of no task", SUBMISSION, shown=[leaderboard_pb2.Leaderboard(task="tasks/none", round=1)])
    yield Case("a ranking of nobody", SUBMISSION, shown=[leaderboard_pb2.Leaderboard(task="tasks/t", round=1)])


def _batches(record: Record) -> Iterator[Case]:
    """The lies about an arena, as many in one log as do not hide each other: so many leaves take seconds."""
    lies = {
        name: (_changed(name, record, ARENA, wanted, change), claim) for name, (wanted, change, claim) in LIES.items()
    }
    more = _changed("a later field of a task", record, ARENA, amendment_of("base-model"), _later("task_changed.config"))
    lies["a later field of a task"] = (more, LIES["another metric"][2])
    yield _changed(
        "a refund of no draw", record, ARENA, event("QUOTA_REFUNDED"), setting("ledger_event.draw", "draws/x")
    )
    batches: list[tuple[Case, set[tuple[Any, int]]]] = []
    for case, claim in lies.values():
        wanted = {(claim, index) for index in case.changed}
        for batch, expected in batches:
            if case.changed.keys() & batch.changed.keys():
                continue
            together = Case("", ARENA, batch.changed | case.changed)
            found = {(each.claim, each.index) for each in together.audit(record).failures}
            if expected | wanted <= found:
                batch.changed |= case.changed
                batch.name = f"{batch.name}; {case.name}"
                expected |= wanted
                break
        else:
            batches.append((case, wanted))
    yield from (batch for batch, _ in batches)


def _tell() -> None:
    """Both logs anew, in place of those that are there."""

    async def nothing(server: RegistryServer, task: str) -> None: ...

    told = ToldLog(
        log_key=key_of("log"), creator=key_of("creator"), node=_NODE, validators=_VALIDATORS, draw_time_s=10**6
    )
    write_record(told.tell().record(), FOLDER / SUBMISSION)
    with tempfile.TemporaryDirectory() as folder:
        write_record(asyncio.run(tell_tasks(Path(folder), nothing)).record, FOLDER / ARENA)


def main() -> None:
    """Writes the file, after the logs when asked to."""
    if "--tell" in sys.argv[1:]:
        _tell()
    logs = read_logs()
    lines = ",\n  ".join(json.dumps(as_document(case, case.audit(logs[case.log]))) for case in _cases(logs))
    CASES.write_text(f'{{\n "about": {json.dumps(_ABOUT)},\n "cases": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
