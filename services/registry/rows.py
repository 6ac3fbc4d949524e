"""Records to rows and back: every field is the column of its name, through a codec where the types differ."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from services.registry import records, tables
from services.registry.convert.configs import config_message, config_of
from services.registry.convert.envelopes import envelope, envelope_message
from services.registry.convert.times import micros_of, moment_of
from services.registry.records import Counts, Finding, Score
from services.registry.tables import Table
from tiltyard.type.v1 import envelope_pb2, task_pb2

R = TypeVar("R")
W = TypeVar("W", bound=Table)


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
    return Codec(lambda member: member.name, lambda name: members[name])


def _score_json(score: Score) -> dict[str, Any]:
    return {**dataclasses.asdict(score), "evaluations": list(score.evaluations), "outliers": list(score.outliers)}


def _score_of(values: Mapping[str, Any]) -> Score:
    return Score(**{**values, "evaluations": tuple(values["evaluations"]), "outliers": tuple(values["outliers"])})


def _finding_of(text: str) -> Finding:
    values = json.loads(text)
    counts = values["counts"]
    return Finding(**{**values, "counts": None if counts is None else Counts(**counts)})


TIME = Codec(micros_of, moment_of)
WEIGHT = Codec(str, int)
CONFIG = Codec(
    lambda config: config_message(config).SerializeToString(deterministic=True),
    lambda kept: config_of(task_pb2.TaskConfig.FromString(kept)),
)
ENVELOPE = Codec(
    lambda statement: envelope_message(statement).SerializeToString(deterministic=True),
    lambda kept: envelope(envelope_pb2.Envelope.FromString(kept)),
)
SCORES = Codec(
    lambda scores: json.dumps({str(round_): _score_json(score) for round_, score in scores.items()}),
    lambda text: {int(round_): _score_of(values) for round_, values in json.loads(text).items()},
)
DRAWS = Codec(
    lambda draws: json.dumps({str(round_): draw for round_, draw in draws.items()}),
    lambda text: {int(round_): draw for round_, draw in json.loads(text).items()},
)
FINDING = Codec(lambda finding: json.dumps(dataclasses.asdict(finding)), _finding_of)


class RowsOf(Generic[R, W]):
    """The rows of one kind of record. Building it fails where a field has no column."""

    def __init__(
        self, record: type[R], row: type[W], *, left_out: frozenset[str] = frozenset(), **codecs: Codec
    ) -> None:
        fields = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
        self._fields = [name for name in fields if name not in left_out]
        missing = (set(self._fields) | set(codecs)) - set(row.model_fields)
        if missing:
            raise TypeError(f"{row.__name__} has no columns {sorted(missing)}")
        self._record = record
        self._row = row
        self._codecs = codecs

    def columns(self, record: R) -> dict[str, Any]:
        """The values of the columns that hold the record's fields."""
        return {name: self._encoded(name, getattr(record, name)) for name in self._fields}

    def row(self, record: R, **more: Any) -> W:
        """A new row; `more` sets columns that no field has."""
        return self._row(**self.columns(record), **more)

    def update(self, row: W, record: R) -> None:
        """Bring a row that is there up to the record."""
        for name, value in self.columns(record).items():
            setattr(row, name, value)

    def record(self, row: W) -> R:
        """The record that a row holds."""
        return self._record(**{name: self._decoded(name, getattr(row, name)) for name in self._fields})

    def _encoded(self, name: str, value: Any) -> Any:
        codec = self._codecs.get(name)
        return value if codec is None else codec.encode(value)

    def _decoded(self, name: str, value: Any) -> Any:
        codec = self._codecs.get(name)
        return value if codec is None else codec.decode(value)


PARTICIPANTS = RowsOf(records.Participant, tables.ParticipantRow, create_time=TIME)
ENDORSEMENTS = RowsOf(records.Endorsement, tables.EndorsementRow, left_out=frozenset({"trusted"}), create_time=TIME)
TASKS = RowsOf(
    records.Task,
    tables.TaskRow,
    config=CONFIG,
    state=_enum(records.TaskState),
    create_time=TIME,
    update_time=TIME,
    holdout=_enum(records.HoldoutState),
    open_time=TIME.optional(),
    close_time=TIME.optional(),
)
MEMBERS = RowsOf(
    records.Member,
    tables.MemberRow,
    role=_enum(records.Role),
    state=_enum(records.MembershipState),
    statement=ENVELOPE.optional(),
    create_time=TIME,
    weight=WEIGHT,
)
SUBMISSIONS = RowsOf(
    records.Submission,
    tables.SubmissionRow,
    state=_enum(records.SubmissionState),
    commit_time=TIME,
    deadline=TIME.optional(),
    reason=_enum(records.RejectionReason).optional(),
    format=_enum(records.ModelFormat).optional(),
    scores=SCORES,
    draws=DRAWS,
    reveal_time=TIME.optional(),
    end_time=TIME.optional(),
)
ROUNDS = RowsOf(records.Round, tables.RoundRow, state=_enum(records.RoundState), deadline=TIME)
ASSIGNMENTS = RowsOf(
    records.Assignment,
    tables.AssignmentRow,
    state=_enum(records.AssignmentState),
    create_time=TIME,
    update_time=TIME,
    deadline=TIME.optional(),
)
EVALUATIONS = RowsOf(
    records.Evaluation,
    tables.EvaluationRow,
    statement=ENVELOPE,
    seal_time=TIME,
    report=ENVELOPE.optional(),
    finding=FINDING.optional(),
    open_time=TIME.optional(),
    verdict=_enum(records.EvaluationVerdict).optional(),
)
VALIDATOR_FAULTS = RowsOf(
    records.ValidatorFault, tables.ValidatorFaultRow, kind=_enum(records.ValidatorFaultKind), time=TIME
)
ARTIFACTS = RowsOf(records.Artifact, tables.ArtifactRow, create_time=TIME)
ARTIFACT_USES = RowsOf(
    records.ArtifactUse, tables.ArtifactUseRow, purpose=_enum(records.ArtifactPurpose), create_time=TIME
)
