"""Records to rows and back: every field is the column of its name, through a codec where the types differ.

The statements that read and write single rows are made once here, in the SQL that SQLite and PostgreSQL share: they go
past SQLAlchemy's compiler, which would cost several times what the database does.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, Generic, TypeVar

from sqlalchemy import Boolean, Select, select

from services.registry import records, states, tables
from services.registry.convert.configs import config_message, config_of
from services.registry.convert.envelopes import envelope, envelope_message
from services.registry.convert.times import micros_of, moment_of
from services.registry.records import Counts, Finding, Score
from services.registry.tables import Table
from services.registry.task_config import TaskConfig
from services.registry.transaction import Leaf
from tiltyard.type.v1 import envelope_pb2, task_pb2

R = TypeVar("R")
_TASKS = 256
_NONE = "{}"


@dataclass(frozen=True)
class Codec:
    """How one field's value is kept in its column."""

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]

    def optional(self) -> "Codec":
        """The same for a field that may be None."""
        return Codec(
            lambda value: None if value is None else self.encode(value),
            lambda value: None if value is None else self.decode(value),
        )


def _enum(members: type[Enum]) -> Codec:
    by_name = {member.name: member for member in members}
    return Codec(attrgetter("name"), by_name.__getitem__)


def _score_json(score: Score) -> dict[str, Any]:
    return {**dataclasses.asdict(score), "evaluations": list(score.evaluations), "outliers": list(score.outliers)}


def _score_of(values: Mapping[str, Any]) -> Score:
    return Score(**{**values, "evaluations": tuple(values["evaluations"]), "outliers": tuple(values["outliers"])})


def _finding_of(text: str) -> Finding:
    values = json.loads(text)
    counts = values["counts"]
    return Finding(**{**values, "counts": None if counts is None else Counts(**counts)})


@lru_cache(_TASKS)
def _config_of(kept: bytes) -> TaskConfig:
    # Stays the same while the task's other columns count its submissions.
    return config_of(task_pb2.TaskConfig.FromString(kept))


BOOL = Codec(lambda value: value, bool)
TIME = Codec(micros_of, moment_of)
WEIGHT = Codec(str, int)
CONFIG = Codec(lambda config: config_message(config).SerializeToString(deterministic=True), _config_of)
ENVELOPE = Codec(
    lambda statement: envelope_message(statement).SerializeToString(deterministic=True),
    lambda kept: envelope(envelope_pb2.Envelope.FromString(kept)),
)
SCORES = Codec(
    lambda scores: json.dumps({str(round_): _score_json(score) for round_, score in scores.items()}),
    lambda text: {} if text == _NONE else {int(round_): _score_of(made) for round_, made in json.loads(text).items()},
)
DRAWS = Codec(
    lambda draws: json.dumps({str(round_): draw for round_, draw in draws.items()}),
    lambda text: {} if text == _NONE else {int(round_): draw for round_, draw in json.loads(text).items()},
)
FINDING = Codec(lambda finding: json.dumps(dataclasses.asdict(finding)), _finding_of)


class RowsOf(Generic[R]):
    """The rows of one kind of record. Building it fails where a field has no column.

    `key` names the fields that find a row; without any, rows are only ever added. `beside` names columns that no field
    has, whose values are given with each record. Fields that are left out come last and have defaults. So many records
    are `remembered` by their rows: for those that are read with many calls and seldom change.
    """

    def __init__(
        self,
        record: type[R],
        row: type[Table],
        *,
        key: Sequence[str] = (),
        beside: Sequence[str] = (),
        left_out: frozenset[str] = frozenset(),
        remembered: int = 0,
        **codecs: Codec,
    ) -> None:
        table = row.metadata.tables[str(row.__tablename__)]
        self.c = table.c
        names = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
        self._names = [name for name in names if name not in left_out]
        missing = {*self._names, *beside, *codecs} - set(self.c.keys())
        if missing:
            raise TypeError(f"{row.__name__} has no columns {sorted(missing)}")
        if self._names != names[: len(self._names)]:
            raise TypeError(f"the fields of {record.__name__} that are left out must be its last")
        codecs = {name: BOOL for name in self._names if isinstance(self.c[name].type, Boolean)} | codecs
        self._record = record
        self._table, self._key, self._beside = table.name, tuple(key), tuple(beside)
        self._values = attrgetter(*self._names)
        self._codecs = [(place, codecs[name]) for place, name in enumerate(self._names) if name in codecs]
        self._codec_of = codecs
        self._record_of = lru_cache(remembered)(self._decoded) if remembered else self._decoded

    def values(self, record: R, *beside: Any) -> tuple[Any, ...]:
        """The values of the columns that are written, in their order."""
        values = list(self._values(record))
        for place, codec in self._codecs:
            values[place] = codec.encode(values[place])
        return (*values, *beside)

    def columns(self, record: R) -> dict[str, Any]:
        """The values of the columns that hold the record's fields, by their names."""
        return dict(zip(self._names, self.values(record), strict=True))

    def record(self, row: Sequence[Any]) -> R:
        """The record that a row holds, whose first columns are those of `query`."""
        return self._record_of(tuple(row[: len(self._names)]))

    def _decoded(self, row: tuple[Any, ...]) -> R:
        values = list(row)
        for place, codec in self._codecs:
            values[place] = codec.decode(values[place])
        return self._record(*values)

    def encoded(self, name: str, value: Any) -> Any:
        """What stands in the column for one field's value."""
        codec = self._codec_of.get(name)
        return value if codec is None else codec.encode(value)

    def key_of(self, record: R) -> tuple[Any, ...]:
        """What finds the record's row."""
        return tuple(self.encoded(name, getattr(record, name)) for name in self._key)

    def query(self, *more: Any) -> Select[Any]:
        """Rows of this kind, with further columns behind."""
        return select(*(self.c[name] for name in self._names), *more)

    @cache  # noqa: B019 - there is one of each kind as long as the process lives
    def reading(self, mark: str) -> str:
        """The statement that reads one row by its key. `mark` is the driver's placeholder."""
        return f"SELECT {_listed(self._names)} FROM {self._table} WHERE {self._found(mark)}"  # noqa: S608 - names of columns

    @cache  # noqa: B019
    def listing(self, mark: str, where: tuple[str, ...], order: tuple[str, ...]) -> str:
        """The statement that reads all rows with these columns' values, in order of those."""
        found = " AND ".join(f'"{name}" = {mark}' for name in where)
        return f"SELECT {_listed(self._names)} FROM {self._table} WHERE {found} ORDER BY {_listed(order)}"  # noqa: S608

    @cache  # noqa: B019
    def writing(self, mark: str) -> str:
        """The statement that inserts a row, or replaces the one with its key, given `values`."""
        names = [*self._names, *self._beside]
        marks = ", ".join([mark] * len(names))
        insert = f"INSERT INTO {self._table} ({_listed(names)}) VALUES ({marks})"  # noqa: S608
        if not self._key:
            return insert
        changed = ", ".join(f'"{name}" = excluded."{name}"' for name in names if name not in self._key)
        return f"{insert} ON CONFLICT ({_listed(self._key)}) DO UPDATE SET {changed}"

    @cache  # noqa: B019
    def deleting(self, mark: str) -> str:
        """The statement that deletes one row by its key."""
        return f"DELETE FROM {self._table} WHERE {self._found(mark)}"  # noqa: S608

    def _found(self, mark: str) -> str:
        return " AND ".join(f'"{name}" = {mark}' for name in self._key)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


COUNTERS_ID = 1


@dataclass(frozen=True)
class Counters:
    """What grows: the log with its frontier, the ledger's position, the last sequence, the time last alive."""

    id: int = COUNTERS_ID
    log_size: int = 0
    log_frontier: bytes = b""
    ledger_position: int = 0
    ledger_digest: bytes | None = None
    """SHA-256 of the event there; None where there is none, or an earlier version has taken it."""
    assignment_sequence: int = 0
    alive_time: int | None = None
    """Microseconds."""


@dataclass(frozen=True)
class LogNode:
    """A complete subtree of two leaves or more."""

    level: int
    index: int
    hash: bytes


@dataclass(frozen=True)
class KeptVerdict:
    """A verdict as the bytes of its message."""

    task: str
    verdict: bytes


@dataclass(frozen=True)
class KeptReceipt:
    """A draw's receipt as it came."""

    draw: str
    receipt: bytes


@dataclass(frozen=True)
class KeptHashes:
    """Hashes of predictions as they were handed in."""

    root: str
    blocks: int
    hashes: bytes


PARTICIPANTS = RowsOf(records.Participant, tables.ParticipantRow, key=("id",), create_time=TIME)
ENDORSEMENTS = RowsOf(
    records.Endorsement,
    tables.EndorsementRow,
    key=("subject", "endorser", "field"),
    left_out=frozenset({"trusted"}),
    create_time=TIME,
)
TASKS = RowsOf(
    records.Task,
    tables.TaskRow,
    key=("id",),
    beside=("deadline",),
    remembered=_TASKS,
    config=CONFIG,
    state=_enum(states.TaskState),
    create_time=TIME,
    update_time=TIME,
    holdout=_enum(states.HoldoutState),
    open_time=TIME.optional(),
    close_time=TIME.optional(),
)
MEMBERS = RowsOf(
    records.Member,
    tables.MemberRow,
    key=("task", "participant"),
    role=_enum(states.Role),
    state=_enum(states.MembershipState),
    statement=ENVELOPE.optional(),
    create_time=TIME,
    weight=WEIGHT,
)
SUBMISSIONS = RowsOf(
    records.Submission,
    tables.SubmissionRow,
    key=("task", "number"),
    state=_enum(states.SubmissionState),
    commit_time=TIME,
    deadline=TIME.optional(),
    reason=_enum(states.RejectionReason).optional(),
    format=_enum(states.ModelFormat).optional(),
    scores=SCORES,
    draws=DRAWS,
    reveal_time=TIME.optional(),
    end_time=TIME.optional(),
)
ROUNDS = RowsOf(
    records.Round,
    tables.RoundRow,
    key=("task", "number", "round"),
    state=_enum(states.RoundState),
    deadline=TIME,
)
ASSIGNMENTS = RowsOf(
    records.Assignment,
    tables.AssignmentRow,
    key=("task", "number", "round", "validator"),
    state=_enum(states.AssignmentState),
    create_time=TIME,
    update_time=TIME,
    deadline=TIME.optional(),
)
EVALUATIONS = RowsOf(
    records.Evaluation,
    tables.EvaluationRow,
    key=("task", "number", "round", "validator"),
    statement=ENVELOPE,
    seal_time=TIME,
    report=ENVELOPE.optional(),
    finding=FINDING.optional(),
    open_time=TIME.optional(),
    verdict=_enum(states.EvaluationVerdict).optional(),
)
VALIDATOR_FAULTS = RowsOf(
    records.ValidatorFault,
    tables.ValidatorFaultRow,
    beside=("slashed",),
    kind=_enum(states.ValidatorFaultKind),
    time=TIME,
)
ARTIFACTS = RowsOf(records.Artifact, tables.ArtifactRow, key=("sha256",), create_time=TIME)
ARTIFACT_USES = RowsOf(
    records.ArtifactUse,
    tables.ArtifactUseRow,
    key=("sha256", "task", "purpose", "number", "owner"),
    purpose=_enum(states.ArtifactPurpose),
    create_time=TIME,
)
VERDICTS = RowsOf(KeptVerdict, tables.VerdictRow)
DRAW_RECEIPTS = RowsOf(KeptReceipt, tables.DrawReceiptRow, key=("draw",))
PREDICTION_HASHES = RowsOf(KeptHashes, tables.PredictionHashesRow, key=("root", "blocks"))
LEAVES = RowsOf(Leaf, tables.LeafRow, key=("index",))
NODES = RowsOf(LogNode, tables.NodeRow, key=("level", "index"))
COUNTERS = RowsOf(Counters, tables.CountersRow, key=("id",))
