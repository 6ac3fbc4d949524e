"""The selector over a real server: every method, roles, bad input, idempotency, quotas, restarts."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status.rpc_status import from_call
from typer.testing import CliRunner

from services.runtime.channels import open_peer
from services.runtime.server import ArenaServer
from services.selector.bootstrap import build
from services.selector.settings import SelectorSettings
from services.selector.stakes import MAX_UNBONDINGS
from tiltyard import bls
from tiltyard.cli import app
from tiltyard.identity import Key
from tiltyard.receipts import receipt_from_json, receipt_to_json, verify_receipt
from tiltyard.selector.v1 import draw_pb2, draw_pb2_grpc, pool_pb2, pool_pb2_grpc, stake_pb2, stake_pb2_grpc
from tiltyard.sortition import SQUARE_ROOT, weight
from tiltyard.type.v1 import draw_pb2 as draw_types
from tiltyard.type.v1 import participation_pb2 as participation
from tiltyard.type.v1 import stake_pb2 as stake_types
from tiltyard.type.v1 import task_pb2 as task_types

AUDIENCE = "tiltyard.local/selector"
TASK = "tasks/digits"
MINIMUM = 1_000_000


@dataclass
class Clock:
    """Stands still until told to go on."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.now


class Peer:
    """One key's stubs."""

    def __init__(self, key: Key, channel: grpc.aio.Channel) -> None:
        self.key = key
        self.channel = channel
        self.name = f"participants/{key.id}"
        self.stakes = stake_pb2_grpc.StakeServiceStub(channel)
        self.eligibility = pool_pb2_grpc.EligibilityServiceStub(channel)
        self.pools = pool_pb2_grpc.PoolServiceStub(channel)
        self.draws = draw_pb2_grpc.DrawServiceStub(channel)


class Arena:
    """A selector in this process, with its callers."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        # With the same key and anchors the draws of a test are the same in every run.
        (folder / "bls.key").write_text("07" * bls.SEED_BYTES)
        (folder / "bls.key").chmod(0o600)
        self.clock = Clock()
        self.keys = {name: Key.generate() for name in ("operator", "service", "alice")}
        self._settings: Callable[[], SelectorSettings] = lambda: SelectorSettings(
            state_dir=folder,
            listen="127.0.0.1:0",
            operators=frozenset({self.keys["operator"].id}),
            services=frozenset({self.keys["service"].id}),
            unbonding_time_s=3600,
            validator_min_stake_micros=MINIMUM,
            training_node_min_stake_micros=MINIMUM // 10,
            task_creator_min_stake_micros=5 * MINIMUM,
            **settings,
        )
        self._channels: list[grpc.aio.Channel] = []
        self._deposits = 0

    async def start(self) -> None:
        settings = self._settings()
        self.selector = await build(settings, clock=self.clock)
        self.server = ArenaServer(
            settings.listen,
            self.selector.mounts,
            authenticator=self.selector.authenticator,
            policy=self.selector.policy,
            remembered=self.selector.database,
        )
        await self.server.start()
        await self.server.set_serving(True)
        self.operator, self.service, self.alice = (
            self.peer(self.keys[name]) for name in ("operator", "service", "alice")
        )

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close()
        await self.server.stop(grace_s=0)
        await self.selector.close()

    def peer(self, key: Key) -> Peer:
        channel = open_peer(self.server.address, key=key, audience=AUDIENCE)
        self._channels.append(channel)
        return Peer(key, channel)

    async def deposit(self, participant: str, micros: int, account: str = "") -> stake_pb2.Stake:
        self._deposits += 1
        request = stake_pb2.DepositRequest(
            participant=participant,
            amount_micros=micros,
            reference=f"payment {self._deposits}",
            funding_account=account or f"account of {participant}",
        )
        return (await self.operator.stakes.Deposit(request)).stake

    async def open_pool(self, task: str = TASK, *, limit: int = 100, **policy: Any) -> pool_pb2.OpenPoolResponse:
        rate = task_types.ValidatorRate(limit=limit, window=Duration(seconds=3600))
        return await self.service.pools.OpenPool(
            pool_pb2.OpenPoolRequest(
                task=task,
                policy=task_types.SelectionPolicy(rate=rate, **policy),
                open_time=_timestamp(self.clock()),
                creator=someone("creator"),
            )
        )

    async def add_validator(
        self, participant: str, minimums: int = 1, *, task: str = TASK, account: str = "", owner: str = ""
    ) -> pool_pb2.AddCandidateResponse:
        await self.deposit(participant, minimums * MINIMUM, account)
        return await self.service.pools.AddCandidate(
            pool_pb2.AddCandidateRequest(
                task=task, participant=participant, role=participation.ROLE_VALIDATOR, owner=owner
            )
        )

    async def draw(self, number: int = 1, **changes: Any) -> draw_types.DrawReceipt:
        return (await self.service.draws.DrawValidators(draw_request(number, **changes))).receipt


def draw_request(number: int = 1, **changes: Any) -> draw_pb2.DrawValidatorsRequest:
    fields = {
        "submission": f"{TASK}/submissions/{number}",
        "round": 1,
        "anchor": hashlib.sha256(f"leaf {number}".encode()).digest(),
        "reveal_salt": b"s" * 32,
        "validators": 3,
        "submitter": someone("submitter"),
    }
    return draw_pb2.DrawValidatorsRequest(**(fields | changes))


def someone(name: str) -> str:
    return "participants/" + hashlib.sha256(name.encode()).hexdigest()[:40]


def _timestamp(time: datetime) -> Timestamp:
    converted = Timestamp()
    converted.FromDatetime(time)
    return converted


def bare(name: str) -> str:
    return name.removeprefix("participants/")


@asynccontextmanager
async def refused(code: grpc.StatusCode, *, reason: str = "", field: str = "") -> AsyncIterator[dict[str, str]]:
    """The call in the block fails with this status; yields the metadata of its ErrorInfo."""
    metadata: dict[str, str] = {}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield metadata
    error = caught.value
    assert error.code() is code, error.details()
    status = from_call(error)  # type: ignore[arg-type]
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details if status else []:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            metadata["retry after"] = retry.retry_delay.ToJsonString()
    metadata.update(info.metadata)
    if reason:
        assert info.reason == reason
    if field:
        assert [violation.field for violation in bad.field_violations] == [field]


@pytest.fixture
async def arena(tmp_path: Path) -> AsyncIterator[Arena]:
    started = Arena(tmp_path)
    await started.start()
    yield started
    await started.stop()


def check_receipt(receipt: draw_types.DrawReceipt, key: bytes) -> None:
    """What an outsider checks."""
    assert verify_receipt(receipt_from_json(receipt_to_json(receipt)), selector_key=key)


# Stakes


async def test_a_deposit_becomes_available_and_is_counted_once_for_each_reference(arena: Arena) -> None:
    request = stake_pb2.DepositRequest(
        participant=arena.alice.name, amount_micros=5, reference="r", funding_account="bank"
    )
    first = await arena.operator.stakes.Deposit(request)
    again = await arena.operator.stakes.Deposit(request)
    assert first.stake.available_micros == again.stake.available_micros == 5
    assert first.stake.name == f"stakes/{arena.alice.key.id}"
    for change in ({"amount_micros": 6}, {"participant": someone("bob")}, {"funding_account": "other"}):
        changed = stake_pb2.DepositRequest()
        changed.CopyFrom(request)
        changed.MergeFrom(stake_pb2.DepositRequest(**change))
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="REFERENCE_REUSED"):
            await arena.operator.stakes.Deposit(changed)
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    assert [(event.kind, event.amount_micros) for event in events] == [(stake_types.LEDGER_EVENT_KIND_DEPOSITED, 5)]
    assert (events[0].reference, events[0].funding_account) == ("r", "bank")


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"amount_micros": 0}, "amount_micros"),
        ({"amount_micros": -1}, "amount_micros"),
        ({"amount_micros": -(2**63)}, "amount_micros"),
        ({"participant": ""}, "participant"),
        ({"participant": "participants/XYZ"}, "participant"),
        ({"reference": ""}, "reference"),
        ({"reference": "r" * 201}, "reference"),
        ({"funding_account": ""}, "funding_account"),
        ({"funding_account": "a\nb"}, "funding_account"),
        ({"funding_account": "bank "}, "funding_account"),
        ({"funding_account": "Zoe\u0308"}, "funding_account"),
        ({"reference": "\u00a0r"}, "reference"),
        ({"request_id": "r" * 65}, "request_id"),
    ],
)
async def test_a_bad_deposit_is_refused_by_its_field(arena: Arena, change: dict[str, Any], bad: str) -> None:
    fields = {"participant": someone("bob"), "amount_micros": 1, "reference": "r", "funding_account": "a"} | change
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.operator.stakes.Deposit(stake_pb2.DepositRequest(**fields))
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{bare(someone('bob'))}"))).stake
    assert stake.available_micros == 0


async def test_all_deposits_together_stay_below_two_to_the_63(arena: Arena) -> None:
    await arena.deposit(someone("rich"), 2**63 - 2)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="LEDGER_FULL") as metadata:
        await arena.deposit(someone("richer"), 2)
    assert metadata["free_micros"] == "1"
    assert (await arena.deposit(someone("richer"), 1)).available_micros == 1


async def test_a_withdrawal_waits(arena: Arena) -> None:
    await arena.deposit(arena.alice.name, 10)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOTHING_UNBONDING"):
        await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STAKE_NOT_AVAILABLE") as metadata:
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=11))
    assert metadata["available_micros"] == "10"
    requested = await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=4))
    assert (requested.stake.available_micros, requested.stake.unbonding_micros) == (6, 4)
    assert requested.wait.seconds == 3600
    release_time = requested.stake.unbondings[0].release_time.ToDatetime(tzinfo=UTC)
    assert release_time == arena.clock() + timedelta(hours=1)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STILL_UNBONDING") as metadata:
        await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    assert datetime.fromisoformat(metadata["release_time"]) == release_time
    arena.clock.now = release_time
    withdrawn = await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())
    assert (withdrawn.withdrawn_micros, withdrawn.stake.unbonding_micros) == (4, 0)
    assert withdrawn.stake.available_micros == 6


async def test_no_more_amounts_wait_than_fit_in_an_answer(arena: Arena) -> None:
    await arena.deposit(arena.alice.name, MAX_UNBONDINGS + 1)
    one = stake_pb2.RequestWithdrawalRequest(amount_micros=1)
    for _ in range(MAX_UNBONDINGS):
        requested = await arena.alice.stakes.RequestWithdrawal(one)
    assert len(requested.stake.unbondings) == MAX_UNBONDINGS
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="TOO_MANY_UNBONDING") as metadata:
        await arena.alice.stakes.RequestWithdrawal(one)
    arena.clock.now = datetime.fromisoformat(metadata["release_time"])
    assert (await arena.alice.stakes.Withdraw(stake_pb2.WithdrawRequest())).withdrawn_micros == MAX_UNBONDINGS
    assert (await arena.alice.stakes.RequestWithdrawal(one)).stake.unbonding_micros == 1


@pytest.mark.parametrize("amount", [0, -5])
async def test_nothing_and_less_cannot_be_asked_back(arena: Arena, amount: int) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="amount_micros"):
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=amount))


async def test_a_request_id_answers_once_and_refuses_another_body(arena: Arena) -> None:
    await arena.deposit(arena.alice.name, 10)
    request = stake_pb2.RequestWithdrawalRequest(amount_micros=3, request_id="once")
    first, second = await asyncio.gather(*(arena.alice.stakes.RequestWithdrawal(request) for _ in range(2)))
    assert first == second
    assert first.stake.unbonding_micros == 3
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="REQUEST_ID_REUSED"):
        await arena.alice.stakes.RequestWithdrawal(
            stake_pb2.RequestWithdrawalRequest(amount_micros=4, request_id="once")
        )


async def test_slashing_takes_available_then_locked_then_unbonding_stake_and_never_more(arena: Arena) -> None:
    await arena.open_pool()
    validator = arena.alice.name
    await arena.add_validator(validator, 4)
    await arena.deposit(validator, 50)
    await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=20))

    async def slash(fault: int, evidence: str) -> stake_pb2.SlashResponse:
        return await arena.service.stakes.Slash(
            stake_pb2.SlashRequest(participant=validator, fault=fault, evidence=evidence)
        )

    outside = stake_types.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE
    first = await slash(outside, "tasks/digits/submissions/1/evaluations/1-x")
    cost = -(-(4 * MINIMUM + 50) * 50 // 1000)
    assert first.slashed_micros == cost
    stake = first.stake
    locked = 4 * MINIMUM - (cost - 30)
    assert (stake.available_micros, stake.locked_micros, stake.unbonding_micros) == (0, locked, 20)
    assert await slash(outside, "tasks/digits/submissions/1/evaluations/1-x") == first
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="EVIDENCE_REUSED"):
        await slash(stake_types.STAKE_FAULT_CONTRADICTION, "tasks/digits/submissions/1/evaluations/1-x")
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert odds.weight == weight(locked, minimum_micros=MINIMUM, curve=SQUARE_ROOT)
    assert (odds.best_split, odds.split_gain) == (3, pytest.approx(3**0.5))
    second = await slash(stake_types.STAKE_FAULT_CONTRADICTION, "fault 2")
    assert second.slashed_micros == locked + 20
    stake = second.stake
    assert (stake.available_micros, stake.locked_micros, stake.unbonding_micros) == (0, 0, 0)
    assert stake.slashed_micros == 4 * MINIMUM + 50
    async with refused(grpc.StatusCode.NOT_FOUND, reason="NOT_A_VALIDATOR"):
        await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (await slash(outside, "fault 3")).slashed_micros == 0
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    slashed = [event for event in events if event.kind == stake_types.LEDGER_EVENT_KIND_SLASHED]
    assert [(event.fault, event.reference, event.amount_micros) for event in slashed] == [
        (outside, "tasks/digits/submissions/1/evaluations/1-x", cost),
        (stake_types.STAKE_FAULT_CONTRADICTION, "fault 2", locked + 20),
    ]


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"fault": 0}, "fault"),
        ({"fault": 99}, "fault"),
        ({"evidence": ""}, "evidence"),
        ({"participant": "x"}, "participant"),
    ],
)
async def test_a_bad_slash_is_refused_by_its_field(arena: Arena, change: dict[str, Any], bad: str) -> None:
    fields = {"participant": someone("bob"), "fault": stake_types.STAKE_FAULT_CONTRADICTION, "evidence": "e"} | change
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.service.stakes.Slash(stake_pb2.SlashRequest(**fields))


async def test_stakes_are_listed_page_by_page(arena: Arena) -> None:
    owners = sorted(someone(str(number)) for number in range(5))
    for owner in owners:
        await arena.deposit(owner, 1)
    listed, token = [], ""
    for size in (2, 2, 1):
        page = await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_size=2, page_token=token))
        assert len(page.stakes) == size
        listed += [stake.name for stake in page.stakes]
        token = page.next_page_token
    assert token == ""
    assert listed == [f"stakes/{bare(owner)}" for owner in owners]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="page_token"):
        await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_token="AAAA" * 10))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="page_size"):
        await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest(page_size=-1))


async def test_events_come_in_order_without_gaps_and_none_from_the_future(arena: Arena) -> None:
    request = stake_pb2.ListLedgerEventsRequest
    empty = await arena.alice.stakes.ListLedgerEvents(request())
    assert (len(empty.events), empty.next_sequence) == (0, 1)
    await arena.open_pool()
    for number in range(4):
        await arena.add_validator(someone(str(number)))
    await arena.draw(validators=2)
    seen: list[int] = []
    start = 0
    while True:
        page = await arena.alice.stakes.ListLedgerEvents(request(start_sequence=start, page_size=3))
        if not page.events:
            break
        seen += [event.sequence for event in page.events]
        start = page.next_sequence
    assert seen == list(range(1, len(seen) + 1))
    # One opening, three events for each validator, two charges.
    assert len(seen) == 1 + 4 * 3 + 2
    assert start == len(seen) + 1
    async with refused(grpc.StatusCode.OUT_OF_RANGE, reason="CURSOR_FROM_THE_FUTURE") as metadata:
        await arena.alice.stakes.ListLedgerEvents(request(start_sequence=start + 1))
    assert metadata["next_sequence"] == str(start)
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="start_sequence"):
        await arena.alice.stakes.ListLedgerEvents(request(start_sequence=-1))


# Roles


def _calls(peer: Peer) -> dict[str, Any]:
    return {
        "Deposit": lambda: peer.stakes.Deposit(stake_pb2.DepositRequest()),
        "Slash": lambda: peer.stakes.Slash(stake_pb2.SlashRequest()),
        "CheckEligibility": lambda: peer.eligibility.CheckEligibility(pool_pb2.CheckEligibilityRequest()),
        "OpenPool": lambda: peer.pools.OpenPool(pool_pb2.OpenPoolRequest()),
        "AddCandidate": lambda: peer.pools.AddCandidate(pool_pb2.AddCandidateRequest()),
        "RemoveCandidate": lambda: peer.pools.RemoveCandidate(pool_pb2.RemoveCandidateRequest()),
        "ClosePool": lambda: peer.pools.ClosePool(pool_pb2.ClosePoolRequest()),
        "MergeOwnerGroups": lambda: peer.pools.MergeOwnerGroups(pool_pb2.MergeOwnerGroupsRequest()),
        "DrawValidators": lambda: peer.draws.DrawValidators(draw_pb2.DrawValidatorsRequest()),
        "ExtendDraw": lambda: peer.draws.ExtendDraw(draw_pb2.ExtendDrawRequest()),
        "SettleAssignment": lambda: peer.draws.SettleAssignment(draw_pb2.SettleAssignmentRequest()),
    }


async def test_what_a_participant_may_not_call(arena: Arena) -> None:
    for name, call in _calls(arena.alice).items():
        async with refused(grpc.StatusCode.PERMISSION_DENIED) as metadata:
            await call()
        assert metadata["method"].endswith(f"/{name}")


async def test_deposits_are_the_operators_and_the_rest_is_for_services(arena: Arena) -> None:
    operator, service = _calls(arena.operator), _calls(arena.service)
    for name in operator:
        allowed, denied = (operator, service) if name == "Deposit" else (service, operator)
        async with refused(grpc.StatusCode.PERMISSION_DENIED):
            await denied[name]()
        async with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await allowed[name]()


async def test_nothing_works_without_a_token_for_the_selector(arena: Arena) -> None:
    async with grpc.aio.insecure_channel(arena.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stake_pb2_grpc.StakeServiceStub(channel).ListStakes(stake_pb2.ListStakesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    async with open_peer(arena.server.address, key=arena.alice.key, audience="tiltyard.local/registry") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stake_pb2_grpc.StakeServiceStub(channel).ListStakes(stake_pb2.ListStakesRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


# Eligibility and pools


def _check(role: "participation.Role.ValueType", **facts: list[str]) -> pool_pb2.CheckEligibilityRequest:
    return pool_pb2.CheckEligibilityRequest(
        participant=someone("bob"), task=TASK, role=role, facts=pool_pb2.EligibilityFacts(**facts)
    )


async def test_validators_and_training_nodes_qualify_by_stake_alone(arena: Arena) -> None:
    check = arena.service.eligibility.CheckEligibility
    endorsed = [someone("endorser")]
    for role, threshold in (
        (participation.ROLE_VALIDATOR, MINIMUM),
        (participation.ROLE_TRAINING_NODE, MINIMUM // 10),
    ):
        answer = await check(_check(role, endorsers=endorsed))
        assert not answer.verdict.eligible
        assert str(threshold) in answer.verdict.explanation
        assert [fact.threshold_micros for fact in answer.verdict.evidence] == [threshold]
        assert answer.policy.validator_min_stake_micros == MINIMUM
    await arena.deposit(someone("bob"), MINIMUM)
    for role in (participation.ROLE_VALIDATOR, participation.ROLE_TRAINING_NODE):
        verdict = (await check(_check(role))).verdict
        assert verdict.eligible
        assert verdict.explanation == ""
        assert verdict.evidence[0].amount_micros == MINIMUM


@pytest.mark.parametrize(
    ("facts", "micros", "kind"),
    [
        ({}, 5 * MINIMUM, participation.EVIDENCE_KIND_STAKE),
        ({"track_record": ["tasks/a/submissions/1"]}, 0, participation.EVIDENCE_KIND_TRACK_RECORD),
        ({"endorsers": [someone("endorser")]}, 0, participation.EVIDENCE_KIND_REPUTATION),
        ({}, 5 * MINIMUM - 1, None),
    ],
)
async def test_a_task_creator_qualifies_by_any_one_fact(
    arena: Arena, facts: dict[str, list[str]], micros: int, kind: int | None
) -> None:
    if micros:
        await arena.deposit(someone("bob"), micros)
    before = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).next_sequence
    answer = await arena.service.eligibility.CheckEligibility(_check(participation.ROLE_TASK_CREATOR, **facts))
    assert answer.verdict.eligible == (kind is not None)
    assert [fact.kind for fact in answer.verdict.evidence if fact.sufficient] == ([] if kind is None else [kind])
    assert len(answer.verdict.evidence) == 3
    after = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).next_sequence
    assert after == before


async def test_past_work_counts_in_tasks_of_other_owner_groups_alone(arena: Arena) -> None:
    """The registry cannot know that a task's creator is paid for from the applicant's funding account."""
    await arena.open_pool()
    await arena.deposit(someone("creator"), 1, account="one bank")
    work = {"track_record": ["tasks/digits/submissions/1", "tasks/digits/submissions/2/evaluations/1-x"]}
    check = arena.service.eligibility.CheckEligibility
    before = (await check(_check(participation.ROLE_TASK_CREATOR, **work))).verdict
    assert before.eligible
    assert list(before.evidence[1].references) == work["track_record"]
    await arena.deposit(someone("bob"), 1, account="one bank")
    after = (await check(_check(participation.ROLE_TASK_CREATOR, **work))).verdict
    assert not after.eligible
    assert list(after.evidence[1].references) == []
    assert "another owner group's task" in after.explanation


async def test_a_pool_opens_once_and_fills_in_the_arenas_defaults(arena: Arena) -> None:
    first = await arena.open_pool()
    assert first == await arena.open_pool()
    assert len(first.selector_key) == bls.PUBLIC_KEY_BYTES
    key = await arena.alice.draws.GetSelectorKey(draw_pb2.GetSelectorKeyRequest())
    assert key.public_key == first.selector_key
    policy = first.policy
    assert (policy.curve, policy.alpha_millis) == (task_types.CURVE_POWER, 500)
    assert policy.validator_min_stake_micros == MINIMUM
    assert policy.rate.reference_stake_micros == 10 * MINIMUM
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="POOL_EXISTS"):
        await arena.open_pool(alpha_millis=250)


@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        ({"curve": 9}, "policy.curve"),
        ({"alpha_millis": 1000}, "policy.alpha_millis"),
        ({"alpha_millis": -1}, "policy.alpha_millis"),
        ({"curve": task_types.CURVE_LOG, "alpha_millis": 1}, "policy.alpha_millis"),
        ({"validator_min_stake_micros": -1}, "policy.validator_min_stake_micros"),
        ({"training_node_min_stake_micros": -1}, "policy.training_node_min_stake_micros"),
        ({"limit": -1}, "policy.rate.limit"),
    ],
)
async def test_a_bad_policy_is_refused_by_its_field(arena: Arena, policy: dict[str, Any], bad: str) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.open_pool(**policy)


@pytest.mark.parametrize(
    "window",
    [Duration(), Duration(seconds=1, nanos=-(10**9)), Duration(seconds=1, nanos=10**9), Duration(seconds=2**40)],
)
async def test_a_rate_window_is_a_second_or_longer(arena: Arena, window: Duration) -> None:
    policy = task_types.SelectionPolicy(rate=task_types.ValidatorRate(window=window))
    request = pool_pb2.OpenPoolRequest(
        task=TASK, policy=policy, open_time=_timestamp(arena.clock()), creator=someone("creator")
    )
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="policy.rate.window"):
        await arena.service.pools.OpenPool(request)


async def test_a_pool_needs_its_opening_time(arena: Arena) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="open_time"):
        await arena.service.pools.OpenPool(pool_pb2.OpenPoolRequest(task=TASK, creator=someone("creator")))


async def test_entering_a_pool_locks_the_stake_and_leaving_gives_it_back(arena: Arena) -> None:
    await arena.open_pool()
    first = await arena.add_validator(arena.alice.name, 4)
    assert (first.locked_micros, first.weight, first.owner_group) == (4 * MINIMUM, 2 * 2**32, arena.alice.key.id)
    add = pool_pb2.AddCandidateRequest(task=TASK, participant=arena.alice.name, role=participation.ROLE_VALIDATOR)
    assert await arena.service.pools.AddCandidate(add) == first
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="STAKE_NOT_AVAILABLE"):
        await arena.alice.stakes.RequestWithdrawal(stake_pb2.RequestWithdrawalRequest(amount_micros=1))
    for role in (participation.ROLE_TRAINING_NODE, participation.ROLE_TASK_CREATOR):
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="ROLE_TAKEN"):
            await arena.service.pools.AddCandidate(
                pool_pb2.AddCandidateRequest(task=TASK, participant=arena.alice.name, role=role)
            )
    remove = pool_pb2.RemoveCandidateRequest(task=TASK, participant=arena.alice.name)
    assert (await arena.service.pools.RemoveCandidate(remove)).unlocked_micros == 4 * MINIMUM
    assert (await arena.service.pools.RemoveCandidate(remove)).unlocked_micros == 0
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{arena.alice.key.id}"))).stake
    assert (stake.available_micros, stake.locked_micros) == (4 * MINIMUM, 0)
    # It may come back in its role, with all that is available by then.
    assert (await arena.add_validator(arena.alice.name, 5)).locked_micros == 9 * MINIMUM


async def test_the_task_creator_takes_no_second_role(arena: Arena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("creator"), MINIMUM)
    async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="ROLE_TAKEN"):
        await arena.add_validator(someone("creator"))


async def test_a_refused_candidate_changes_nothing(arena: Arena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("poor"), MINIMUM - 1)
    before = await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())
    answer = await arena.service.pools.AddCandidate(
        pool_pb2.AddCandidateRequest(
            task=TASK, participant=someone("poor"), role=participation.ROLE_VALIDATOR, owner=someone("owner")
        )
    )
    assert not answer.verdict.eligible
    assert (answer.locked_micros, answer.weight, answer.owner_group) == (0, 0, bare(someone("poor")))
    assert before == await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())


async def test_a_training_node_locks_the_minimum_and_weighs_nothing(arena: Arena) -> None:
    await arena.open_pool()
    await arena.deposit(someone("node"), MINIMUM)
    answer = await arena.service.pools.AddCandidate(
        pool_pb2.AddCandidateRequest(task=TASK, participant=someone("node"), role=participation.ROLE_TRAINING_NODE)
    )
    assert (answer.locked_micros, answer.weight) == (MINIMUM // 10, 0)


async def test_a_closed_pool_gives_all_stakes_back_and_ends_its_draws(arena: Arena) -> None:
    await arena.open_pool()
    for name in "abcd":
        await arena.add_validator(someone(name))
    receipt = await arena.draw()
    close = pool_pb2.ClosePoolRequest(task=TASK)
    await arena.service.pools.ClosePool(close)
    await arena.service.pools.ClosePool(close)
    stakes = (await arena.alice.stakes.ListStakes(stake_pb2.ListStakesRequest())).stakes
    assert [(stake.available_micros, stake.locked_micros) for stake in stakes] == [(MINIMUM, 0)] * 4
    assert await arena.draw() == receipt
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.draw(2)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=4))
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.add_validator(someone("late"))
    odds = draw_pb2.EstimateOddsRequest(task=TASK, validators=1, participant=someone("a"))
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="POOL_CLOSED"):
        await arena.alice.draws.EstimateOdds(odds)


async def test_an_unknown_pool_is_not_found(arena: Arena) -> None:
    for call in (
        lambda: arena.draw(),
        lambda: arena.add_validator(someone("a")),
        lambda: arena.service.pools.ClosePool(pool_pb2.ClosePoolRequest(task=TASK)),
        lambda: arena.service.pools.RemoveCandidate(
            pool_pb2.RemoveCandidateRequest(task=TASK, participant=someone("a"))
        ),
        lambda: arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1)),
    ):
        async with refused(grpc.StatusCode.NOT_FOUND, reason="POOL_NOT_FOUND"):
            await call()


# Draws


async def test_a_draw_can_be_checked_by_its_receipt_alone(arena: Arena) -> None:
    key = (await arena.open_pool()).selector_key
    for number in range(12):
        await arena.add_validator(someone(str(number)), 1 + number)
    receipt = await arena.draw(paused=[someone("3")])
    assert len({pick.participant for pick in receipt.picks}) == 3
    assert receipt.assigned == 3
    assert (receipt.task, receipt.pool_size) == (TASK, 12)
    check_receipt(receipt, key)
    assert await arena.draw() == receipt
    assert (await arena.alice.draws.GetDraw(draw_pb2.GetDrawRequest(name=receipt.draw))).receipt == receipt
    for change in ({"anchor": b"a" * 32}, {"reveal_salt": b"t" * 32}, {"validators": 2}):
        async with refused(grpc.StatusCode.ALREADY_EXISTS, reason="DRAW_EXISTS"):
            await arena.draw(**change)
    second_round = await arena.draw(round=2)
    assert second_round.draw != receipt.draw


async def test_reserves_come_from_the_same_order_whatever_happens_to_the_pool(arena: Arena) -> None:
    key = (await arena.open_pool()).selector_key
    for number in range(9):
        await arena.add_validator(someone(str(number)), 1 + number)
    receipt = await arena.draw()
    twin = await arena.draw(2, anchor=receipt.anchor)
    assert [pick.participant for pick in twin.picks] == [pick.participant for pick in receipt.picks]
    extend = arena.service.draws.ExtendDraw
    undisturbed = (await extend(draw_pb2.ExtendDrawRequest(draw=twin.draw, picks=9))).receipt
    check_receipt(undisturbed, key)
    assert len({pick.participant for pick in undisturbed.picks}) == 9
    order = [pick.participant for pick in undisturbed.picks]
    gone, paused = order[4], order[5]
    await arena.service.pools.RemoveCandidate(pool_pb2.RemoveCandidateRequest(task=TASK, participant=gone))
    await arena.add_validator(someone("newcomer"), 1000)
    request = draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=6, paused=[paused])
    extended = (await extend(request)).receipt
    check_receipt(extended, key)
    assert [pick.participant for pick in extended.picks] == [*order[:4], *order[6:8]]
    reasons = [(passed.place, passed.reason) for passed in extended.passed_over]
    assert reasons == [
        (4, draw_types.PASSED_OVER_REASON_LEFT),
        (5, draw_types.PASSED_OVER_REASON_PAUSED),
    ]
    assert (await extend(request)).receipt == extended
    assert extended.picks[:3] == receipt.picks
    rest = (await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=100))).receipt
    assert [pick.participant for pick in rest.picks] == [*order[:4], *order[6:]]
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="ORDER_EXHAUSTED"):
        await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=100))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="picks"):
        await extend(draw_pb2.ExtendDrawRequest(draw=receipt.draw, picks=2000))


async def test_too_few_validators_are_refused_with_the_counts(arena: Arena) -> None:
    await arena.open_pool(limit=1)
    await arena.add_validator(someone("submitter"))
    await arena.add_validator(someone("of the creator"), owner=someone("creator"))
    for name in ("a", "b", "c", "d"):
        await arena.add_validator(someone(name))
    await arena.draw(1, validators=1, paused=[someone(name) for name in "bcd"])
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS") as metadata:
        await arena.draw(2, paused=[someone("b"), someone("c")])
    assert {name: value for name, value in metadata.items() if name != "refill_time"} == {
        "eligible": "1",
        "wanted": "3",
        "submitter": "1",
        "task_creator": "1",
        "paused": "2",
        "quota": "1",
    }
    assert datetime.fromisoformat(metadata["refill_time"]) == arena.clock() + timedelta(hours=1)
    # A refused draw has charged nobody.
    assert len((await arena.draw(2, validators=2, paused=[someone("b")])).picks) == 2


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        ({"submission": TASK}, "submission"),
        ({"round": 0}, "round"),
        ({"round": 3}, "round"),
        ({"anchor": b"short"}, "anchor"),
        ({"reveal_salt": b""}, "reveal_salt"),
        ({"validators": 0}, "validators"),
        ({"validators": 100}, "validators"),
        ({"submitter": ""}, "submitter"),
        ({"paused": [someone("a"), "b"]}, "paused[1]"),
    ],
)
async def test_a_bad_draw_is_refused_by_its_field(arena: Arena, change: dict[str, Any], bad: str) -> None:
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field=bad):
        await arena.draw(**change)


async def test_an_unknown_draw_is_not_found(arena: Arena) -> None:
    settle = draw_pb2.SettleAssignmentRequest(
        draw="draws/none", participant=someone("a"), settlement=draw_pb2.SETTLEMENT_CHARGED
    )
    for call in (
        lambda: arena.alice.draws.GetDraw(draw_pb2.GetDrawRequest(name="draws/none")),
        lambda: arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw="draws/none", picks=1)),
        lambda: arena.service.draws.SettleAssignment(settle),
    ):
        async with refused(grpc.StatusCode.NOT_FOUND, reason="DRAW_NOT_FOUND"):
            await call()


async def test_an_owner_group_is_picked_once_and_by_one_of_its_members(arena: Arena) -> None:
    await arena.open_pool()
    for name in "abc":
        await arena.add_validator(someone(name), account="the same bank")
    for name in "de":
        await arena.add_validator(someone(name), owner=someone("landlord"))
    await arena.add_validator(someone("f"))
    bank = min(bare(someone(name)) for name in "abc")
    picked = set()
    for number in range(1, 30):
        receipt = await arena.draw(number)
        groups = [pick.owner_group for pick in receipt.picks]
        assert len(set(groups)) == 3
        pick = receipt.picks[groups.index(bank)]
        assert list(pick.members) == sorted(someone(name) for name in "abc")
        picked.add(pick.participant)
    assert picked == {someone(name) for name in "abc"}


async def test_groups_that_become_one_in_an_open_pool_are_drawn_as_one(arena: Arena) -> None:
    key = (await arena.open_pool()).selector_key
    names = sorted(someone(name) for name in "abcd")
    for name in names:
        await arena.add_validator(name)
    before = await arena.draw(1, validators=1, paused=names[1:])
    assert [pick.participant for pick in before.picks] == [names[0]]
    await arena.deposit(names[3], 1, account=f"account of {names[0]}")
    stake = (await arena.alice.stakes.GetStake(stake_pb2.GetStakeRequest(name=f"stakes/{bare(names[3])}"))).stake
    assert stake.owner_group == bare(names[0])
    receipt = await arena.draw(2)
    check_receipt(receipt, key)
    joined = next(pick for pick in receipt.picks if pick.owner_group == bare(names[0]))
    assert list(joined.members) == [names[0], names[3]]
    assert int.from_bytes(joined.group_weight, "big") == int(2**32 * 2**0.5)
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS"):
        await arena.draw(3, validators=4)
    # The older draw goes on over the older pool, in which they were two.
    extended = await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=before.draw, picks=4))
    check_receipt(extended.receipt, key)
    places = [*extended.receipt.picks, *extended.receipt.passed_over]
    assert {place.owner_group for place in places} == {bare(name) for name in names}
    assert [passed.reason for passed in extended.receipt.passed_over if passed.owner_group == bare(names[3])] in (
        [draw_types.PASSED_OVER_REASON_ALREADY_PICKED],
        [draw_types.PASSED_OVER_REASON_PAUSED],
    )


async def test_an_owner_that_signs_for_members_makes_them_one_in_pools_they_are_in(arena: Arena) -> None:
    key = (await arena.open_pool()).selector_key
    for name in "abcde":
        await arena.add_validator(someone(name))
    merge = arena.service.pools.MergeOwnerGroups
    merged = ""
    for name in "ab":
        request = pool_pb2.MergeOwnerGroupsRequest(participant=someone(name), owner=someone("landlord"))
        merged = (await merge(request)).owner_group
        assert (await merge(request)).owner_group == merged
    assert merged == min(bare(someone(name)) for name in ("a", "b", "landlord"))
    # An owner of the creator's is no validator of its task, whoever signed for whom.
    await merge(pool_pb2.MergeOwnerGroupsRequest(participant=someone("creator"), owner=someone("c")))
    receipt = await arena.draw()
    check_receipt(receipt, key)
    assert sorted(pick.owner_group for pick in receipt.picks) == sorted(
        [merged, bare(someone("d")), bare(someone("e"))]
    )
    pick = next(pick for pick in receipt.picks if pick.owner_group == merged)
    assert list(pick.members) == sorted([someone("a"), someone("b")])
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS") as metadata:
        await arena.draw(2, validators=4)
    assert (metadata["eligible"], metadata["task_creator"]) == ("3", "1")
    events = (await arena.alice.stakes.ListLedgerEvents(stake_pb2.ListLedgerEventsRequest())).events
    assert [
        (event.participant, event.reference)
        for event in events
        if event.kind == stake_types.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED
    ] == [
        (someone("a"), someone("landlord")),
        (someone("b"), someone("landlord")),
        (someone("creator"), someone("c")),
    ]
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="owner"):
        await merge(pool_pb2.MergeOwnerGroupsRequest(participant=someone("a"), owner=someone("a")))
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="participant"):
        await merge(pool_pb2.MergeOwnerGroupsRequest(owner=someone("a")))


# Quotas


async def test_a_reference_stake_that_weighs_nothing_gives_every_group_the_whole_limit(arena: Arena) -> None:
    """The creator chooses the least stake, and may choose a reference stake far below it."""
    rate = task_types.ValidatorRate(limit=7, window=Duration(seconds=3600), reference_stake_micros=1)
    policy = task_types.SelectionPolicy(curve=task_types.CURVE_LOG, validator_min_stake_micros=2**40, rate=rate)
    await arena.service.pools.OpenPool(
        pool_pb2.OpenPoolRequest(
            task=TASK, policy=policy, open_time=_timestamp(arena.clock()), creator=someone("creator")
        )
    )
    await arena.add_validator(arena.alice.name, 2**40 // MINIMUM + 1)
    assert len((await arena.draw(validators=1)).picks) == 1
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (odds.quota_used, odds.quota_limit) == (1, 7)


async def test_a_quota_is_used_up_refunded_and_refilled(arena: Arena) -> None:
    await arena.open_pool(limit=2)
    await arena.add_validator(arena.alice.name, 10)

    async def settle(receipt: draw_types.DrawReceipt, settlement: "draw_pb2.Settlement.ValueType") -> int:
        request = draw_pb2.SettleAssignmentRequest(
            draw=receipt.draw, participant=arena.alice.name, settlement=settlement
        )
        return (await arena.service.draws.SettleAssignment(request)).used

    first, second = [await arena.draw(number, validators=1) for number in (1, 2)]
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert (odds.quota_used, odds.quota_limit) == (2, 2)
    assert odds.refill_time.ToDatetime(tzinfo=UTC) == arena.clock() + timedelta(hours=1)
    arena.clock.now += timedelta(minutes=10, milliseconds=250)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP") as metadata:
        await arena.draw(3, validators=1)
    assert (metadata["quota"], metadata["eligible"], metadata["retry after"]) == ("1", "0", "2999.750s")
    assert await settle(first, draw_pb2.SETTLEMENT_CHARGED) == 2
    assert await settle(second, draw_pb2.SETTLEMENT_REFUNDED) == 1
    assert await settle(second, draw_pb2.SETTLEMENT_REFUNDED) == 1
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="ALREADY_SETTLED"):
        await settle(second, draw_pb2.SETTLEMENT_CHARGED)
    await arena.draw(3, validators=1)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP"):
        await arena.draw(4, validators=1)
    async with refused(grpc.StatusCode.NOT_FOUND, reason="PICK_NOT_FOUND"):
        await arena.service.draws.SettleAssignment(
            draw_pb2.SettleAssignmentRequest(
                draw=first.draw, participant=someone("x"), settlement=draw_pb2.SETTLEMENT_CHARGED
            )
        )
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="settlement"):
        await settle(first, draw_pb2.SETTLEMENT_UNSPECIFIED)
    arena.clock.now += timedelta(seconds=2999, milliseconds=749)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUOTA_USED_UP") as metadata:
        await arena.draw(4, validators=1)
    assert metadata["retry after"] == "0.001s"
    arena.clock.now += timedelta(milliseconds=1)
    await arena.draw(4, validators=1)


async def test_a_thousand_concurrent_draws_never_overshoot_a_quota_by_one(arena: Arena) -> None:
    await arena.open_pool(limit=150)
    for number in range(6):
        await arena.add_validator(someone(str(number)), 10, account="one bank" if number < 2 else "")

    codes: set[grpc.StatusCode] = set()

    async def attempt(number: int) -> draw_types.DrawReceipt | None:
        try:
            return await arena.draw(number, validators=1)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
            return None

    receipts = [receipt for receipt in await asyncio.gather(*map(attempt, range(1, 1001))) if receipt]
    uses: dict[str, int] = {}
    for receipt in receipts:
        group = receipt.picks[0].owner_group
        uses[group] = uses.get(group, 0) + 1
    assert uses == dict.fromkeys(uses, 150)
    assert len(uses) == 5
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}


# Odds


async def test_odds_are_exact_in_a_small_pool(arena: Arena) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bc":
        await arena.add_validator(someone(name))
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=2))
    assert (odds.weight, odds.pool_weight) == (2 * 2**32, str(4 * 2**32))
    # 1 minus the chance that the two others come first: 2 * 1/4 * 1/3.
    assert odds.probability == pytest.approx(1 - 2 * (1 / 4) * (1 / 3))
    assert odds.standard_error == 0
    of_another = draw_pb2.EstimateOddsRequest(task=TASK, validators=3, participant=someone("b"))
    assert (await arena.alice.draws.EstimateOdds(of_another)).probability == 1
    async with refused(grpc.StatusCode.INVALID_ARGUMENT, field="validators"):
        await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK))


async def test_a_stake_of_very_many_minimums_has_a_best_split(arena: Arena) -> None:
    await arena.open_pool(validator_min_stake_micros=1)
    await arena.add_validator(arena.alice.name, 2**40 // MINIMUM)
    odds = await arena.alice.draws.EstimateOdds(draw_pb2.EstimateOddsRequest(task=TASK, validators=1))
    assert odds.best_split == 2**40 // MINIMUM * MINIMUM


async def test_odds_know_that_the_creators_owner_group_is_never_drawn(arena: Arena) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bc":
        await arena.add_validator(someone(name))

    async def chance(participant: str, validators: int) -> float:
        request = draw_pb2.EstimateOddsRequest(task=TASK, validators=validators, participant=participant)
        return (await arena.alice.draws.EstimateOdds(request)).probability

    assert await chance(someone("b"), 3) == 1
    await arena.deposit(someone("creator"), 1, account=f"account of {someone('c')}")
    assert await chance(someone("c"), 1) == 0
    assert await chance(someone("b"), 1) == pytest.approx(1 / 3)
    assert await chance(someone("b"), 3) == 0
    async with refused(grpc.StatusCode.FAILED_PRECONDITION, reason="NOT_ENOUGH_VALIDATORS"):
        await arena.draw(validators=3)


# Restarts


async def test_a_restart_in_the_middle_of_draws_keeps_them_and_goes_on(tmp_path: Path) -> None:
    arena = Arena(tmp_path)
    await arena.start()
    key = (await arena.open_pool()).selector_key
    for number in range(20):
        await arena.add_validator(someone(str(number)), 1 + number)
    before = [await arena.draw(number) for number in range(1, 11)]
    await arena.stop()
    await arena.start()
    try:
        assert (await arena.open_pool()).selector_key == key
        assert [await arena.draw(number) for number in range(1, 11)] == before
        after = await arena.draw(11)
        check_receipt(after, key)
        assert after.pool_root == before[0].pool_root
        extended = await arena.service.draws.ExtendDraw(draw_pb2.ExtendDrawRequest(draw=before[0].draw, picks=5))
        check_receipt(extended.receipt, key)
        assert extended.receipt.picks[:3] == before[0].picks
        await arena.add_validator(someone("newcomer"), 3)
        check_receipt(await arena.draw(12), key)
    finally:
        await arena.stop()


# Commands


async def test_the_commands_export_check_and_explain_a_draw(arena: Arena, tmp_path: Path) -> None:
    await arena.open_pool()
    await arena.add_validator(arena.alice.name, 4)
    for name in "bcde":
        await arena.add_validator(someone(name))
    receipt = await arena.draw(1, paused=[arena.alice.name], validators=4)
    key = tmp_path / "alice.pem"
    arena.keys["alice"].save(key)
    reached = ["--key", str(key), "--selector", arena.server.address]

    async def command(*arguments: str) -> str:
        # A command runs a loop of its own, so it needs a thread of its own.
        result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    exported, selector_key = tmp_path / "receipt.json", tmp_path / "selector.pub"
    await command("draw", "export", receipt.draw, "--out", str(exported), *reached)
    # The server logs to the same standard output.
    printed = await command("draw", "export", receipt.draw.removeprefix("draws/"), *reached)
    assert printed.endswith(exported.read_text())
    await command("draw", "key", "--out", str(selector_key), *reached)
    assert "proved: the 4 picks" in await command("draw", "verify", str(exported), "--key", str(selector_key))
    shown = await command("draw", "show", receipt.draw, *reached)
    assert shown.count("assigned") == 4
    told = await command("odds", "--draw", receipt.draw, *reached)
    if receipt.passed_over:
        assert "passed over: paused" in shown
        assert "all members of its owner group were paused" in told
    else:
        assert "did not come up" in told
    told = await command("odds", "digits", "--validators", "1", *reached)
    assert "0.333333 of being among 1 (exact)" in told
    assert "63 of 63 left in this window" in told
    assert "over 4 funding accounts would weigh 2 times as much" in told
