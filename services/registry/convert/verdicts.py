"""Eligibility verdicts in both worlds."""

from services.registry.convert.enums import ROLE
from services.registry.convert.times import moment, timestamp
from services.registry.records import Evidence, Verdict
from services.runtime import names
from tiltyard.type.v1 import participation_pb2

_KIND_PREFIX = "EVIDENCE_KIND_"


def verdict_message(verdict: Verdict) -> participation_pb2.EligibilityVerdict:
    """The verdict with its evidence; `verdict_of` gives back an equal one."""
    return participation_pb2.EligibilityVerdict(
        task=names.format_task(verdict.task),
        participant=names.format_participant(verdict.participant),
        role=ROLE.number(verdict.role),
        eligible=verdict.eligible,
        evidence=[
            participation_pb2.Evidence(
                kind=participation_pb2.EvidenceKind.Value(_KIND_PREFIX + evidence.kind),
                sufficient=evidence.sufficient,
                amount_micros=evidence.amount_micros,
                threshold_micros=evidence.threshold_micros,
                references=evidence.references,
            )
            for evidence in verdict.evidence
        ],
        explanation=verdict.explanation,
        decide_time=timestamp(verdict.decide_time),
    )


def verdict_of(message: participation_pb2.EligibilityVerdict) -> Verdict:
    """The domain's verdict of one that the selector or the database gave."""
    return Verdict(
        task=names.parse_task(message.task, "verdict.task"),
        participant=names.parse_participant(message.participant, "verdict.participant"),
        role=ROLE.member(message.role),
        eligible=message.eligible,
        evidence=tuple(
            Evidence(
                kind=participation_pb2.EvidenceKind.Name(evidence.kind).removeprefix(_KIND_PREFIX),
                sufficient=evidence.sufficient,
                amount_micros=evidence.amount_micros,
                threshold_micros=evidence.threshold_micros,
                references=tuple(evidence.references),
            )
            for evidence in message.evidence
        ),
        explanation=message.explanation,
        decide_time=moment(message.decide_time),
    )
