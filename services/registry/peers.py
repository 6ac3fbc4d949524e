"""The selector, asked over gRPC with the registry's own key."""

from collections.abc import Awaitable, Collection, Sequence
from typing import TypeVar

import grpc

from services.registry.convert.configs import policy_message, policy_of
from services.registry.convert.enums import ROLE
from services.registry.convert.times import timestamp
from services.registry.convert.verdicts import verdict_of
from services.registry.records import Draw, Task
from services.registry.selection import Candidacy, Eligibility, EligibilityFacts
from services.registry.states import Role, ValidatorFaultKind
from services.registry.task_config import SelectionPolicy
from services.runtime import names
from services.runtime.errors import NotFound
from services.runtime.rpc_errors import from_rpc_error
from tiltyard.selector.v1 import draw_pb2, draw_pb2_grpc, pool_pb2, pool_pb2_grpc, stake_pb2, stake_pb2_grpc
from tiltyard.sortition import draw_id
from tiltyard.type.v1 import draw_pb2 as type_draw_pb2
from tiltyard.type.v1 import stake_pb2 as type_stake_pb2

T = TypeVar("T")

_STAKE_FAULT = {
    ValidatorFaultKind.LEASE_EXPIRED: type_stake_pb2.STAKE_FAULT_SEAL_MISSING,
    ValidatorFaultKind.SEAL_UNOPENED: type_stake_pb2.STAKE_FAULT_SEAL_NOT_OPENED,
    ValidatorFaultKind.OUTLIER: type_stake_pb2.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE,
}


class SelectorPeer:
    """`selection.Selection` over the selector's stubs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stakes = stake_pb2_grpc.StakeServiceStub(channel)
        self._eligibility = pool_pb2_grpc.EligibilityServiceStub(channel)
        self._pools = pool_pb2_grpc.PoolServiceStub(channel)
        self._draws = draw_pb2_grpc.DrawServiceStub(channel)

    async def check_eligibility(
        self, *, participant: str, task: str, role: Role, facts: EligibilityFacts, policy: SelectionPolicy
    ) -> Eligibility:
        request = pool_pb2.CheckEligibilityRequest(
            participant=names.format_participant(participant),
            task=names.format_task(task),
            role=ROLE.number(role),
            facts=_facts_message(facts),
            policy=policy_message(policy),
        )
        answer = await _asked(self._eligibility.CheckEligibility(request))
        return Eligibility(verdict_of(answer.verdict), policy_of(answer.policy))

    async def open_pool(self, task: Task) -> None:
        request = pool_pb2.OpenPoolRequest(
            task=names.format_task(task.id),
            policy=policy_message(task.config.selection),
            open_time=timestamp(task.open_time),
            creator=names.format_participant(task.creator),
        )
        await _asked(self._pools.OpenPool(request))

    async def add_candidate(
        self, *, task: str, participant: str, role: Role, facts: EligibilityFacts, owner: str | None
    ) -> Candidacy:
        request = pool_pb2.AddCandidateRequest(
            task=names.format_task(task),
            participant=names.format_participant(participant),
            role=ROLE.number(role),
            facts=_facts_message(facts),
            owner="" if owner is None else names.format_participant(owner),
        )
        answer = await _asked(self._pools.AddCandidate(request))
        return Candidacy(verdict_of(answer.verdict), answer.locked_micros, answer.weight, answer.owner_group)

    async def merge_owner_groups(self, participant: str, *, owner: str) -> None:
        request = pool_pb2.MergeOwnerGroupsRequest(
            participant=names.format_participant(participant), owner=names.format_participant(owner)
        )
        await _asked(self._pools.MergeOwnerGroups(request))

    async def remove_candidate(self, *, task: str, participant: str) -> None:
        request = pool_pb2.RemoveCandidateRequest(
            task=names.format_task(task), participant=names.format_participant(participant)
        )
        await _asked(self._pools.RemoveCandidate(request))

    async def close_pool(self, task: str) -> None:
        await _asked(self._pools.ClosePool(pool_pb2.ClosePoolRequest(task=names.format_task(task))))

    async def draw_validators(
        self,
        *,
        task: str,
        number: int,
        round_: int,
        anchor: bytes,
        salt: bytes,
        validators: int,
        submitter: str,
        paused: Collection[str],
    ) -> Draw:
        request = draw_pb2.DrawValidatorsRequest(
            submission=names.format_submission(task, number),
            round=round_,
            anchor=anchor,
            reveal_salt=salt,
            validators=validators,
            submitter=names.format_participant(submitter),
            paused=[names.format_participant(participant) for participant in sorted(paused)],
        )
        answer = await _asked(self._draws.DrawValidators(request))
        return _draw_of(answer.receipt)

    async def extend_draw(self, draw: str, *, picks: int, paused: Collection[str]) -> Draw:
        request = draw_pb2.ExtendDrawRequest(
            draw=names.format_draw(draw),
            picks=picks,
            paused=[names.format_participant(participant) for participant in sorted(paused)],
        )
        answer = await _asked(self._draws.ExtendDraw(request))
        return _draw_of(answer.receipt)

    async def find_draw(self, *, task: str, number: int, round_: int) -> Draw | None:
        draw = draw_id(names.format_submission(task, number), round_)
        try:
            answer = await _asked(self._draws.GetDraw(draw_pb2.GetDrawRequest(name=names.format_draw(draw))))
        except NotFound:
            return None
        return _draw_of(answer.receipt)

    async def settle(self, draw: str, participant: str, *, refund: bool) -> None:
        request = draw_pb2.SettleAssignmentRequest(
            draw=names.format_draw(draw),
            participant=names.format_participant(participant),
            settlement=draw_pb2.SETTLEMENT_REFUNDED if refund else draw_pb2.SETTLEMENT_CHARGED,
        )
        await _asked(self._draws.SettleAssignment(request))

    async def slash(self, participant: str, kind: ValidatorFaultKind, *, evidence: str) -> None:
        request = stake_pb2.SlashRequest(
            participant=names.format_participant(participant), fault=_STAKE_FAULT[kind], evidence=evidence
        )
        await _asked(self._stakes.Slash(request))

    async def ledger_events(self, *, start: int, limit: int) -> Sequence[tuple[int, bytes]]:
        request = stake_pb2.ListLedgerEventsRequest(start_sequence=start, page_size=limit)
        answer = await _asked(self._stakes.ListLedgerEvents(request))
        return [(event.sequence, event.SerializeToString(deterministic=True)) for event in answer.events]

    async def selector_key(self) -> bytes:
        answer = await _asked(self._draws.GetSelectorKey(draw_pb2.GetSelectorKeyRequest()))
        return answer.public_key


async def _asked(call: Awaitable[T]) -> T:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _facts_message(facts: EligibilityFacts) -> pool_pb2.EligibilityFacts:
    return pool_pb2.EligibilityFacts(
        track_record=facts.track_record,
        endorsers=[names.format_participant(endorser) for endorser in facts.endorsers],
    )


def _draw_of(receipt: type_draw_pb2.DrawReceipt) -> Draw:
    return Draw(
        id=names.parse_draw(receipt.draw, "receipt.draw"),
        order=tuple(names.parse_participant(pick.participant, "receipt.picks") for pick in receipt.picks),
        receipt=receipt.SerializeToString(deterministic=True),
    )
