"""What the registry's tests stand on: a clock that is set, and a selector that keeps its books in memory."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from services.registry.records import Draw, Evidence, Task, Verdict
from services.registry.selection import Candidacy, Eligibility, EligibilityFacts
from services.registry.states import Role, ValidatorFaultKind
from services.registry.task_config import SelectionPolicy
from services.runtime import names
from services.runtime.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from tiltyard.commitments import tagged_hash
from tiltyard.type.v1 import draw_pb2, stake_pb2

START = datetime(2026, 1, 1, tzinfo=UTC)
SELECTOR_KEY = bytes(48)


class SettableClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, *, seconds: float) -> None:
        """Move the clock forward."""
        self.now += timedelta(seconds=seconds)


@dataclass
class FakePool:
    """One task's pool."""

    policy: SelectionPolicy
    creator: str
    open: bool = True
    candidates: dict[str, Role] = field(default_factory=dict)


@dataclass
class FakeDraw:
    """One draw: the whole order, and how much of it was given."""

    asked: tuple[object, ...]
    task: str
    submission: str
    round: int
    order: tuple[str, ...]
    picks: list[str]


class FakeSelection:
    """The selector's answers without its chain of proofs: stakes decide, orders follow from the anchor.

    `refused` are those who are never eligible; `unavailable` makes every question raise Unavailable; `before` is called
    with each question's name and may raise.
    """

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.refused: set[str] = set()
        self.endorsement_needed: set[str] = set()
        self.unavailable = False
        self.before: Callable[[str], None] = lambda question: None
        self.pools: dict[str, FakePool] = {}
        self.draws: dict[str, FakeDraw] = {}
        self.settlements: dict[tuple[str, str], bool] = {}
        self.slashes: dict[tuple[str, str], ValidatorFaultKind] = {}
        self.events: list[bytes] = []
        self.facts_seen: list[EligibilityFacts] = []
        self.owners: dict[str, str] = {}

    async def check_eligibility(
        self, *, participant: str, task: str, role: Role, facts: EligibilityFacts, policy: SelectionPolicy
    ) -> Eligibility:
        self._asked("check_eligibility")
        return Eligibility(self._verdict(participant, task, role, facts), _with_defaults(policy))

    async def open_pool(self, task: Task) -> None:
        self._asked("open_pool")
        pool = self.pools.get(task.id)
        if pool is None:
            self.pools[task.id] = FakePool(task.config.selection, task.creator)
            self.record(stake_pb2.LEDGER_EVENT_KIND_POOL_OPENED, task=task.id)
        elif pool.policy != task.config.selection:
            raise AlreadyExists("POOL_EXISTS", "the pool has another policy")

    async def add_candidate(
        self, *, task: str, participant: str, role: Role, facts: EligibilityFacts, owner: str | None
    ) -> Candidacy:
        self._asked("add_candidate")
        pool = self._open_pool(task)
        if pool.candidates.get(participant, role) is not role:
            raise AlreadyExists("ROLE_TAKEN", "the candidate has another role")
        verdict = self._verdict(participant, task, role, facts)
        if not verdict.eligible:
            return Candidacy(verdict)
        if participant not in pool.candidates:
            pool.candidates[participant] = role
            self.record(stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_ADDED, task=task, participant=participant)
        weight = 1 << 32 if role is Role.VALIDATOR else 0
        return Candidacy(verdict, locked_micros=100, weight=weight, owner_group=owner or participant)

    async def merge_owner_groups(self, participant: str, *, owner: str) -> None:
        self._asked("merge_owner_groups")
        self.owners[participant] = owner
        self.record(stake_pb2.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED, participant=participant)

    async def remove_candidate(self, *, task: str, participant: str) -> None:
        self._asked("remove_candidate")
        pool = self.pools.get(task)
        if pool is not None and pool.candidates.pop(participant, None) is not None:
            self.record(stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_REMOVED, task=task, participant=participant)

    async def close_pool(self, task: str) -> None:
        self._asked("close_pool")
        pool = self.pools.get(task)
        if pool is None:
            raise NotFound("POOL_UNKNOWN", "there is no such pool")
        if pool.open:
            pool.open = False
            pool.candidates.clear()
            self.record(stake_pb2.LEDGER_EVENT_KIND_POOL_CLOSED, task=task)

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
        self._asked("draw_validators")
        name = f"{task}-{number}-{round_}"
        asked = (anchor, salt, validators, submitter)
        known = self.draws.get(name)
        if known is not None:
            if known.asked != asked:
                raise AlreadyExists("DRAW_EXISTS", "the draw was asked for otherwise")
            return self._draw(name)
        pool = self._open_pool(task)
        seed = tagged_hash(b"fake", anchor, salt)
        order = tuple(
            sorted(
                (
                    candidate
                    for candidate, role in pool.candidates.items()
                    if role is Role.VALIDATOR and candidate not in (submitter, pool.creator)
                ),
                key=lambda candidate: hashlib.sha256(seed + candidate.encode()).digest(),
            )
        )
        picks = [candidate for candidate in order if candidate not in paused][:validators]
        if len(picks) < validators:
            raise FailedPrecondition(
                "NOT_ENOUGH_VALIDATORS", "too few owner groups are eligible", eligible=str(len(picks))
            )
        self.draws[name] = FakeDraw(asked, task, names.format_submission(task, number), round_, order, picks)
        self._charge(name, picks)
        return self._draw(name)

    async def extend_draw(self, draw: str, *, picks: int, paused: Collection[str]) -> Draw:
        self._asked("extend_draw")
        known = self.draws[draw]
        # A place that was passed over does not come up again.
        place = max(known.order.index(pick) for pick in known.picks) + 1
        more = [candidate for candidate in known.order[place:] if candidate not in paused]
        wanted = picks - len(known.picks)
        if wanted > 0 and not more:
            raise FailedPrecondition("ORDER_EXHAUSTED", "no group is left")
        further = more[: max(wanted, 0)]
        known.picks.extend(further)
        self._charge(draw, further)
        return self._draw(draw)

    async def find_draw(self, *, task: str, number: int, round_: int) -> Draw | None:
        self._asked("find_draw")
        name = f"{task}-{number}-{round_}"
        return self._draw(name) if name in self.draws else None

    async def settle(self, draw: str, participant: str, *, refund: bool) -> None:
        self._asked("settle")
        is_new = (draw, participant) not in self.settlements
        if self.settlements.setdefault((draw, participant), refund) is not refund:
            raise FailedPrecondition("ALREADY_SETTLED", "the assignment was settled otherwise")
        if is_new and refund:
            self.record(stake_pb2.LEDGER_EVENT_KIND_QUOTA_REFUNDED, participant=participant, draw=draw)

    async def slash(self, participant: str, kind: ValidatorFaultKind, *, evidence: str) -> None:
        self._asked("slash")
        if self.slashes.setdefault((participant, evidence), kind) is not kind:
            raise AlreadyExists("EVIDENCE_REUSED", "this evidence was used before")

    async def ledger_events(self, *, start: int, limit: int) -> Sequence[tuple[int, bytes]]:
        self._asked("ledger_events")
        return list(enumerate(self.events, start=1))[start - 1 : start - 1 + limit]

    async def selector_key(self) -> bytes:
        self._asked("selector_key")
        return SELECTOR_KEY

    def _asked(self, question: str) -> None:
        self.before(question)
        if self.unavailable:
            raise Unavailable("SELECTOR_DOWN", "the selector cannot be reached")

    def _charge(self, draw: str, participants: Sequence[str]) -> None:
        for participant in participants:
            self.record(stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED, participant=participant, draw=draw)

    def _open_pool(self, task: str) -> FakePool:
        pool = self.pools.get(task)
        if pool is None:
            raise NotFound("POOL_UNKNOWN", "there is no such pool")
        if not pool.open:
            raise FailedPrecondition("POOL_CLOSED", "the pool is closed")
        return pool

    def _verdict(self, participant: str, task: str, role: Role, facts: EligibilityFacts) -> Verdict:
        self.facts_seen.append(facts)
        endorsed = bool(facts.endorsers)
        staked = participant not in self.refused and participant not in self.endorsement_needed
        eligible = participant not in self.refused and (staked or endorsed)
        evidence = [Evidence("STAKE", staked, amount_micros=100 if staked else 0, threshold_micros=100)]
        if endorsed:
            endorsers = tuple(map(names.format_participant, facts.endorsers))
            evidence.append(Evidence("REPUTATION", True, references=endorsers))
        return Verdict(
            task=task,
            participant=participant,
            role=role,
            eligible=eligible,
            evidence=tuple(evidence),
            explanation="" if eligible else "the stake is below the threshold",
            decide_time=self._clock(),
        )

    def _draw(self, name: str) -> Draw:
        known = self.draws[name]
        receipt = draw_pb2.DrawReceipt(
            draw=names.format_draw(name),
            task=names.format_task(known.task),
            submission=known.submission,
            round=known.round,
            assigned=len(known.picks),
            picks=[
                draw_pb2.Pick(position=position, participant=names.format_participant(pick))
                for position, pick in enumerate(known.picks)
            ],
        )
        return Draw(name, tuple(known.picks), receipt.SerializeToString(deterministic=True))

    def record(
        self, kind: stake_pb2.LedgerEventKind.ValueType, *, task: str = "", participant: str = "", draw: str = ""
    ) -> None:
        event = stake_pb2.LedgerEvent(
            sequence=len(self.events) + 1,
            kind=kind,
            task=names.format_task(task) if task else "",
            participant=names.format_participant(participant) if participant else "",
            draw=names.format_draw(draw) if draw else "",
        )
        event.time.FromDatetime(self._clock())
        self.events.append(event.SerializeToString(deterministic=True))


def _with_defaults(policy: SelectionPolicy) -> SelectionPolicy:
    rate = replace(
        policy.rate,
        window=policy.rate.window or timedelta(hours=24),
        limit=policy.rate.limit or 100,
        reference_stake_micros=policy.rate.reference_stake_micros or 1_000_000_000,
    )
    return replace(
        policy,
        alpha_millis=policy.alpha_millis or 500,
        validator_min_stake_micros=policy.validator_min_stake_micros or 100_000_000,
        training_node_min_stake_micros=policy.training_node_min_stake_micros or 10_000_000,
        rate=rate,
    )
