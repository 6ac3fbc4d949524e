"""Entries of the record log as the bytes of one tiltyard.type.v1.LogEntry: made once, hashed, and kept."""

from datetime import datetime
from functools import singledispatch

from services.registry import entries
from services.registry.convert import enums
from services.registry.convert.configs import config_message
from services.registry.convert.envelopes import envelope_message
from services.registry.convert.scores import score_message
from services.registry.convert.times import timestamp
from services.registry.convert.verdicts import verdict_message
from services.registry.entries import Entry
from services.runtime import names
from services.runtime.names import AssignmentId
from tiltyard.commitments import score_commitment
from tiltyard.type.v1 import draw_pb2, log_pb2, stake_pb2


def leaf_bytes(entry: Entry, time: datetime) -> bytes:
    """The leaf of `entry`, written at `time`."""
    message = _message(entry)
    message.time.CopyFrom(timestamp(time))
    return message.SerializeToString(deterministic=True)


def genesis_of(leaf: bytes) -> entries.Genesis:
    """What leaf 0 says."""
    genesis = log_pb2.LogEntry.FromString(leaf).genesis
    return entries.Genesis(
        origin=genesis.origin,
        log_key=genesis.log_key,
        selector_key=genesis.selector_key,
        operators=tuple(names.parse_participant(each, "genesis.operators") for each in genesis.operators),
    )


@singledispatch
def _message(entry: object) -> log_pb2.LogEntry:
    raise TypeError(f"no leaf is made of {type(entry).__name__}")


@_message.register
def _genesis(entry: entries.Genesis) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        genesis=log_pb2.Genesis(
            origin=entry.origin,
            log_key=entry.log_key,
            selector_key=entry.selector_key,
            operators=[names.format_participant(operator) for operator in entry.operators],
        )
    )


@_message.register
def _participant_registered(entry: entries.ParticipantRegistered) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        participant_registered=log_pb2.ParticipantRegistered(
            participant=names.format_participant(entry.participant),
            public_key=entry.public_key,
            display_name=entry.display_name,
            endpoint=entry.endpoint,
        )
    )


@_message.register
def _owner_bound(entry: entries.OwnerBound) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(owner_bound=log_pb2.OwnerBound(statement=envelope_message(entry.statement)))


@_message.register
def _endorsement_changed(entry: entries.EndorsementChanged) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(endorsement_changed=log_pb2.EndorsementChanged(statement=envelope_message(entry.statement)))


@_message.register
def _verdict_given(entry: entries.VerdictGiven) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(verdict=verdict_message(entry.verdict))


@_message.register
def _task_created(entry: entries.TaskCreated) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        task_created=log_pb2.TaskCreated(
            task=names.format_task(entry.task),
            creator=names.format_participant(entry.creator),
            config=config_message(entry.config),
        )
    )


@_message.register
def _task_changed(entry: entries.TaskChanged) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        task_changed=log_pb2.TaskChanged(
            task=names.format_task(entry.task),
            state=enums.TASK_STATE.number(entry.state),
            config=None if entry.config is None else config_message(entry.config),
            reason=entry.reason,
        )
    )


@_message.register
def _membership_changed(entry: entries.MembershipChanged) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        membership_changed=log_pb2.MembershipChanged(
            task=names.format_task(entry.task),
            participant=names.format_participant(entry.participant),
            role=enums.ROLE.number(entry.role),
            state=enums.MEMBERSHIP_STATE.number(entry.state),
            statement=None if entry.statement is None else envelope_message(entry.statement),
        )
    )


@_message.register
def _submission_committed(entry: entries.SubmissionCommitted) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        submission_committed=log_pb2.SubmissionCommitted(
            submission=names.format_submission(entry.task, entry.number), statement=envelope_message(entry.statement)
        )
    )


@_message.register
def _submission_revealed(entry: entries.SubmissionRevealed) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        submission_revealed=log_pb2.SubmissionRevealed(
            submission=names.format_submission(entry.task, entry.number),
            statement=envelope_message(entry.statement),
            size_bytes=entry.size_bytes,
        )
    )


@_message.register
def _submission_changed(entry: entries.SubmissionChanged) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        submission_changed=log_pb2.SubmissionChanged(
            submission=names.format_submission(entry.task, entry.number),
            state=enums.SUBMISSION_STATE.number(entry.state),
            reason=enums.REJECTION_REASON.number(entry.reason),
            detail=entry.detail,
            original="" if entry.original is None else names.format_submission(entry.task, entry.original),
        )
    )


@_message.register
def _draw_made(entry: entries.DrawMade) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(draw=draw_pb2.DrawReceipt.FromString(entry.receipt))


@_message.register
def _assignment_changed(entry: entries.AssignmentChanged) -> log_pb2.LogEntry:
    duty = AssignmentId(entry.task, entry.number, entry.round, entry.validator)
    return log_pb2.LogEntry(
        assignment_changed=log_pb2.AssignmentChanged(
            assignment=names.format_assignment(duty),
            state=enums.ASSIGNMENT_STATE.number(entry.state),
            deadline=timestamp(entry.deadline),
            position=entry.position,
        )
    )


@_message.register
def _evaluation_sealed(entry: entries.EvaluationSealed) -> log_pb2.LogEntry:
    duty = AssignmentId(entry.task, entry.number, entry.round, entry.validator)
    return log_pb2.LogEntry(
        evaluation_sealed=log_pb2.EvaluationSealed(
            evaluation=names.format_evaluation(duty), statement=envelope_message(entry.statement)
        )
    )


@_message.register
def _evaluation_opened(entry: entries.EvaluationOpened) -> log_pb2.LogEntry:
    duty = AssignmentId(entry.task, entry.number, entry.round, entry.validator)
    return log_pb2.LogEntry(
        evaluation_opened=log_pb2.EvaluationOpened(
            evaluation=names.format_evaluation(duty), report=envelope_message(entry.report), salt=entry.salt
        )
    )


@_message.register
def _score_concluded(entry: entries.ScoreConcluded) -> log_pb2.LogEntry:
    concluded = log_pb2.ScoreConcluded(submission=names.format_submission(entry.task, entry.number))
    score = score_message(entry.score, task=entry.task, number=entry.number)
    if entry.hidden:
        data = score.SerializeToString(deterministic=True)
        concluded.commitment = score_commitment(score=data, salt=entry.salt)
    else:
        concluded.score.CopyFrom(score)
        concluded.salt = entry.salt
    return log_pb2.LogEntry(score_concluded=concluded)


@_message.register
def _validator_fault_found(entry: entries.ValidatorFaultFound) -> log_pb2.LogEntry:
    duty = AssignmentId(entry.task, entry.number, entry.round, entry.validator)
    return log_pb2.LogEntry(
        validator_fault=log_pb2.ValidatorFault(
            assignment=names.format_assignment(duty), kind=enums.VALIDATOR_FAULT_KIND.number(entry.kind)
        )
    )


@_message.register
def _outage_ended(entry: entries.OutageEnded) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        outage_ended=log_pb2.OutageEnded(last_alive=timestamp(entry.last_alive), back=timestamp(entry.back))
    )


@_message.register
def _ledger_event_seen(entry: entries.LedgerEventSeen) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(ledger_event=stake_pb2.LedgerEvent.FromString(entry.event))


@_message.register
def _holdout_changed(entry: entries.HoldoutChanged) -> log_pb2.LogEntry:
    return log_pb2.LogEntry(
        holdout_changed=log_pb2.HoldoutChanged(
            task=names.format_task(entry.task), accepted=entry.accepted, reason=entry.reason
        )
    )
