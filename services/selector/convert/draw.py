"""DrawService's messages."""

from collections.abc import Sequence

from services.runtime import names
from services.runtime.fields import FieldChecks
from services.selector.convert.stake import shown_weight
from services.selector.convert.times import timestamp
from services.selector.draws import DrawOrder
from services.selector.odds_estimates import OddsEstimate
from services.selector.records import Settlement
from tiltyard.selector.v1 import draw_pb2 as pb

_MAX_VALIDATORS = 99
_MAX_PAUSED = 100_000
_SETTLEMENTS = {
    pb.SETTLEMENT_CHARGED: Settlement.CHARGED,
    pb.SETTLEMENT_REFUNDED: Settlement.REFUNDED,
}


def draw_order(request: pb.DrawValidatorsRequest) -> DrawOrder:
    """Raises InvalidArgument."""
    task, _ = names.parse_submission(request.submission, "submission")
    submitter = names.parse_participant(request.submitter, "submitter")
    checks = FieldChecks()
    checks.range("round", request.round, minimum=1, maximum=2)
    checks.digest("anchor", request.anchor)
    checks.digest("reveal_salt", request.reveal_salt)
    checks.range("validators", request.validators, minimum=1, maximum=_MAX_VALIDATORS)
    checks.finish()
    return DrawOrder(
        task=task,
        submission=request.submission,
        round=request.round,
        anchor=request.anchor,
        reveal_salt=request.reveal_salt,
        validators=request.validators,
        submitter=submitter,
        paused=_paused(request.paused),
    )


def extension(request: pb.ExtendDrawRequest) -> tuple[str, int, frozenset[str]]:
    """Draw, picks wanted in all, paused members. Raises InvalidArgument."""
    name = names.parse_draw(request.draw, "draw")
    checks = FieldChecks()
    checks.range("picks", request.picks, minimum=1, maximum=2**31 - 1)
    checks.finish()
    return name, request.picks, _paused(request.paused)


def settlement(request: pb.SettleAssignmentRequest) -> tuple[str, str, Settlement]:
    """Draw, participant, and who was to blame. Raises InvalidArgument."""
    name = names.parse_draw(request.draw, "draw")
    participant = names.parse_participant(request.participant, "participant")
    checks = FieldChecks()
    checks.one_of("settlement", request.settlement, _SETTLEMENTS)
    checks.finish()
    return name, participant, _SETTLEMENTS[request.settlement]


def odds_question(request: pb.EstimateOddsRequest, caller: str) -> tuple[str, str, int]:
    """Task, participant and number of validators. Raises InvalidArgument."""
    task = names.parse_task(request.task, "task")
    participant = names.parse_participant(request.participant, "participant") if request.participant else caller
    checks = FieldChecks()
    checks.range("validators", request.validators, minimum=1, maximum=_MAX_VALIDATORS)
    checks.finish()
    return task, participant, request.validators


def estimate_odds_response(estimate: OddsEstimate) -> pb.EstimateOddsResponse:
    """Weight, chance and quota."""
    return pb.EstimateOddsResponse(
        weight=shown_weight(estimate.weight),
        pool_weight=str(estimate.pool_weight),
        probability=estimate.chance.probability,
        standard_error=estimate.chance.standard_error,
        quota_used=estimate.quota.used,
        quota_limit=estimate.quota.limit,
        refill_time=timestamp(estimate.quota.refill_time),
        best_split=estimate.split.parts,
        split_gain=estimate.split.gain,
    )


def _paused(members: Sequence[str]) -> frozenset[str]:
    checks = FieldChecks()
    checks.count("paused", members, maximum=_MAX_PAUSED)
    checks.finish()
    return frozenset(names.parse_participant(member, f"paused[{index}]") for index, member in enumerate(members))
