"""EligibilityService's and PoolService's messages."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from services.runtime import names
from services.runtime.fields import FieldChecks
from services.selector.convert.stake import shown_weight
from services.selector.convert.times import LAST_SECOND, MAX_NANOS, duration, timestamp, to_datetime
from services.selector.eligibility import Applicant, Facts
from services.selector.pools import Admission
from services.selector.records import MAX_MICROS, EvidenceKind, Policy, Role, Verdict
from tiltyard.selector.v1 import pool_pb2 as pb
from tiltyard.sortition import Curve, CurveKind
from tiltyard.type.v1 import participation_pb2 as participation
from tiltyard.type.v1 import task_pb2 as task_types

_DEFAULT_ALPHA_MILLIS = 500
_DEFAULT_WINDOW_S = 24 * 3600
_DEFAULT_LIMIT = 100
_DEFAULT_REFERENCE = 10
_MAX_LIMIT = 2**31 - 1
_MAX_WINDOW_S = 366 * 24 * 3600
_MAX_REFERENCES = 1000
_REFERENCE_CHARS = 200

_ROLES = {participation.Role.Value(f"ROLE_{role.name}"): role for role in Role}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}
_EVIDENCE_KINDS = {kind: participation.EvidenceKind.Value(f"EVIDENCE_KIND_{kind.name}") for kind in EvidenceKind}
_CURVES = {task_types.Curve.Value(f"CURVE_{kind.name}"): kind for kind in CurveKind}
CURVE_NUMBERS = {kind: number for number, kind in _CURVES.items()}


@dataclass(frozen=True)
class ArenaDefaults:
    """The least stakes, in micro-units, where a task names none."""

    validator_min_stake_micros: int
    training_node_min_stake_micros: int


@dataclass(frozen=True)
class Opening:
    """What a pool is opened with."""

    task: str
    policy: Policy
    open_time: datetime
    creator: str


def policy(message: task_types.SelectionPolicy, defaults: ArenaDefaults) -> Policy:
    """A policy with the arena's defaults filled in. Raises InvalidArgument on `policy...`."""
    checks = FieldChecks()
    kind = _CURVES.get(message.curve or task_types.CURVE_POWER, CurveKind.POWER)
    checks.require("policy.curve", message.curve in (0, *_CURVES), f"is {message.curve}, which is not known")
    if kind is CurveKind.POWER:
        checks.range("policy.alpha_millis", message.alpha_millis, minimum=0, maximum=999, unit="thousandths")
    else:
        checks.require("policy.alpha_millis", message.alpha_millis == 0, f"is for the power curve, not {kind.value}")
    for field, value in (
        ("policy.validator_min_stake_micros", message.validator_min_stake_micros),
        ("policy.training_node_min_stake_micros", message.training_node_min_stake_micros),
        ("policy.rate.reference_stake_micros", message.rate.reference_stake_micros),
    ):
        checks.range(field, value, minimum=0, maximum=MAX_MICROS, unit="micro-units")
    checks.range("policy.rate.limit", message.rate.limit, minimum=0, maximum=_MAX_LIMIT)
    window_s, nanos = _DEFAULT_WINDOW_S, 0
    if message.rate.HasField("window"):
        window_s, nanos = message.rate.window.seconds, message.rate.window.nanos
        if checks.range("policy.rate.window", window_s, minimum=1, maximum=_MAX_WINDOW_S, unit="s"):
            checks.range("policy.rate.window", nanos, minimum=0, maximum=MAX_NANOS, unit="ns beside the seconds")
    checks.finish()
    minimum = message.validator_min_stake_micros or defaults.validator_min_stake_micros
    alpha = (message.alpha_millis or _DEFAULT_ALPHA_MILLIS) if kind is CurveKind.POWER else 0
    return Policy(
        curve=Curve(kind, alpha),
        validator_min_stake_micros=minimum,
        training_node_min_stake_micros=(
            message.training_node_min_stake_micros or defaults.training_node_min_stake_micros
        ),
        window=timedelta(seconds=window_s, microseconds=nanos // 1000),
        limit=message.rate.limit or _DEFAULT_LIMIT,
        reference_stake_micros=(message.rate.reference_stake_micros or min(_DEFAULT_REFERENCE * minimum, MAX_MICROS)),
    )


def policy_message(settled: Policy) -> task_types.SelectionPolicy:
    """A policy with every field set."""
    return task_types.SelectionPolicy(
        curve=CURVE_NUMBERS[settled.curve.kind],
        alpha_millis=settled.curve.alpha_millis,
        validator_min_stake_micros=settled.validator_min_stake_micros,
        training_node_min_stake_micros=settled.training_node_min_stake_micros,
        rate=task_types.ValidatorRate(
            window=duration(settled.window),
            limit=settled.limit,
            reference_stake_micros=settled.reference_stake_micros,
        ),
    )


def applicant(request: pb.CheckEligibilityRequest | pb.AddCandidateRequest) -> Applicant:
    """Raises InvalidArgument."""
    task = names.parse_task(request.task, "task")
    participant = names.parse_participant(request.participant, "participant")
    checks = FieldChecks()
    checks.one_of("role", request.role, _ROLES)
    facts = request.facts
    checks.count("facts.endorsers", facts.endorsers, maximum=_MAX_REFERENCES)
    if checks.count("facts.track_record", facts.track_record, maximum=_MAX_REFERENCES):
        for index, reference in enumerate(facts.track_record):
            checks.text(f"facts.track_record[{index}]", reference, max_chars=_REFERENCE_CHARS)
    checks.finish()
    for index, endorser in enumerate(facts.endorsers):
        names.parse_participant(endorser, f"facts.endorsers[{index}]")
    return Applicant(
        task=task,
        participant=participant,
        role=_ROLES[request.role],
        facts=Facts(tuple(facts.track_record), tuple(facts.endorsers)),
    )


def owner(request: pb.AddCandidateRequest) -> str:
    """The owner's participant id, empty for none. Raises InvalidArgument."""
    return names.parse_participant(request.owner, "owner") if request.owner else ""


def opening(request: pb.OpenPoolRequest, defaults: ArenaDefaults) -> Opening:
    """Raises InvalidArgument."""
    task = names.parse_task(request.task, "task")
    creator = names.parse_participant(request.creator, "creator")
    checks = FieldChecks()
    if checks.require("open_time", request.HasField("open_time")):
        checks.range("open_time", request.open_time.seconds, minimum=0, maximum=LAST_SECOND, unit="s since 1970")
        checks.range("open_time", request.open_time.nanos, minimum=0, maximum=MAX_NANOS, unit="ns beside the seconds")
    checks.finish()
    return Opening(task, policy(request.policy, defaults), to_datetime(request.open_time), creator)


def check_eligibility_response(verdict: Verdict, settled: Policy) -> pb.CheckEligibilityResponse:
    """The verdict, and the policy that it was given by."""
    return pb.CheckEligibilityResponse(verdict=verdict_message(verdict), policy=policy_message(settled))


def open_pool_response(settled: Policy, selector_key: bytes) -> pb.OpenPoolResponse:
    """The policy of the pool, and the key that signs its draws."""
    return pb.OpenPoolResponse(selector_key=selector_key, policy=policy_message(settled))


def add_candidate_response(admission: Admission) -> pb.AddCandidateResponse:
    """The verdict, and what it locked."""
    return pb.AddCandidateResponse(
        verdict=verdict_message(admission.verdict),
        locked_micros=admission.locked_micros,
        weight=shown_weight(admission.weight),
        owner_group=admission.owner_group,
    )


def member(request: pb.RemoveCandidateRequest) -> tuple[str, str]:
    """Task and participant. Raises InvalidArgument."""
    return names.parse_task(request.task, "task"), names.parse_participant(request.participant, "participant")


def merging(request: pb.MergeOwnerGroupsRequest) -> tuple[str, str]:
    """Participant and owner. Raises InvalidArgument."""
    participant = names.parse_participant(request.participant, "participant")
    owner = names.parse_participant(request.owner, "owner")
    checks = FieldChecks()
    checks.require("owner", owner != participant, "is the participant itself")
    checks.finish()
    return participant, owner


def verdict_message(verdict: Verdict) -> participation.EligibilityVerdict:
    """A verdict with its evidence."""
    return participation.EligibilityVerdict(
        task=names.format_task(verdict.task),
        participant=names.format_participant(verdict.participant),
        role=_ROLE_NUMBERS[verdict.role],
        eligible=verdict.eligible,
        evidence=[
            participation.Evidence(
                kind=_EVIDENCE_KINDS[fact.kind],
                sufficient=fact.sufficient,
                amount_micros=fact.amount_micros,
                threshold_micros=fact.threshold_micros,
                references=fact.references,
            )
            for fact in verdict.evidence
        ],
        explanation=verdict.explanation,
        decide_time=timestamp(verdict.decide_time),
    )
