"""Owner groups, pools, candidates, leaves and seats in SQL."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Row, bindparam
from sqlmodel import Session, col, exists, or_, select

from services.selector.columns import connection_of, from_us, table_of, to_us, weight_bytes, weight_of
from services.selector.records import Candidate, Evidence, EvidenceKind, LeafChange, Policy, Pool, Role, Verdict
from services.selector.rows import CandidateRow, FundingAccountRow, LeafRow, OwnerGroupRow, PoolRow, SeatRow
from tiltyard.sortition import Curve, CurveKind

_MICROSECOND = timedelta(microseconds=1)
_GROUPS = table_of(OwnerGroupRow)
_GROUPS_OF = select(_GROUPS.c.participant, _GROUPS.c.owner_group).where(
    _GROUPS.c.participant.in_(bindparam("names", expanding=True))
)
_POOLS = table_of(PoolRow)
_POOL = _POOLS.select().where(_POOLS.c.task == bindparam("name"))
_CANDIDATES = table_of(CandidateRow)
_RELEASE = (
    _CANDIDATES.update()
    .where(_CANDIDATES.c.task == bindparam("pool"), _CANDIDATES.c.active)
    .values(locked_micros=0, weight=bindparam("nothing"), active=False)
)
_SEATS = table_of(SeatRow)
_LEAVES = table_of(LeafRow)
_LEAF_CHANGES = (
    _LEAVES.select()
    .where(
        _LEAVES.c.task == bindparam("pool"),
        _LEAVES.c.version > bindparam("after"),
        _LEAVES.c.version <= bindparam("upto"),
    )
    .order_by(_LEAVES.c.version)
)
_ROWS_AT_ONCE = 10_000


class SqlGroupRecords:
    """Implements GroupRecords."""

    _session: Session

    def owner_group(self, participant: str) -> str:
        row = self._session.get(OwnerGroupRow, participant)
        return row.owner_group if row else participant

    def owner_groups(self, participants: Collection[str]) -> Mapping[str, str]:
        rows = connection_of(self._session).execute(_GROUPS_OF, {"names": list(participants)})
        joined = {participant: group for participant, group in rows}
        return {participant: joined.get(participant, participant) for participant in participants}

    def owner_group_members(self, owner_group: str) -> Sequence[str]:
        query = select(OwnerGroupRow.participant).where(OwnerGroupRow.owner_group == owner_group)
        # The group bears the id of one of its members, who has no row before somebody joins.
        return sorted({owner_group, *self._session.exec(query)})

    def put_owner_group(self, participant: str, owner_group: str) -> None:
        self._session.merge(OwnerGroupRow(participant=participant, owner_group=owner_group))

    def funded_by(self, funding_account: str) -> str | None:
        row = self._session.get(FundingAccountRow, funding_account)
        return row.participant if row else None

    def add_funding_account(self, funding_account: str, participant: str) -> None:
        self._session.add(FundingAccountRow(funding_account=funding_account, participant=participant))


class SqlPoolRecords:
    """Implements PoolRecords."""

    _session: Session

    def pool(self, task: str) -> Pool | None:
        row = connection_of(self._session).execute(_POOL, {"name": task}).one_or_none()
        return _pool(row) if row else None

    def put_pool(self, pool: Pool) -> None:
        policy = pool.policy
        self._session.merge(
            PoolRow(
                task=pool.task,
                curve=policy.curve.kind.value,
                alpha_millis=policy.curve.alpha_millis,
                validator_min_stake_micros=policy.validator_min_stake_micros,
                training_node_min_stake_micros=policy.training_node_min_stake_micros,
                window_us=policy.window // _MICROSECOND,
                quota_limit=policy.limit,
                reference_stake_micros=policy.reference_stake_micros,
                open_time_us=to_us(pool.open_time),
                creator=pool.creator,
                closed=pool.closed,
                version=pool.version,
                leaf_count=pool.leaf_count,
                root=pool.root,
            )
        )

    def candidate(self, task: str, participant: str) -> Candidate | None:
        row = self._session.get(CandidateRow, (task, participant))
        return _candidate(row) if row else None

    def put_candidate(self, candidate: Candidate) -> None:
        verdict = candidate.verdict
        self._session.merge(
            CandidateRow(
                task=verdict.task,
                participant=verdict.participant,
                role=verdict.role.value,
                evidence=json.dumps([_evidence_json(fact) for fact in verdict.evidence]),
                explanation=verdict.explanation,
                decide_time_us=to_us(verdict.decide_time),
                locked_micros=candidate.locked_micros,
                weight=weight_bytes(candidate.weight),
                active=candidate.active,
            )
        )

    def release_candidates(self, task: str) -> None:
        connection_of(self._session).execute(_RELEASE, {"pool": task, "nothing": weight_bytes(0)})
        self._session.expire_all()

    def candidacies(self, participant: str) -> Sequence[Candidate]:
        query = select(CandidateRow).where(CandidateRow.participant == participant, col(CandidateRow.active))
        return [_candidate(row) for row in self._session.exec(query.order_by(CandidateRow.task))]

    def put_leaf(self, task: str, change: LeafChange) -> None:
        self._session.add(
            LeafRow(
                task=task,
                version=change.version,
                leaf_index=change.index,
                owner_group=change.owner_group,
                stake_micros=change.stake_micros,
                weight=weight_bytes(change.weight),
            )
        )

    def leaf(self, task: str, owner_group: str) -> LeafChange | None:
        query = select(LeafRow).where(LeafRow.task == task, LeafRow.owner_group == owner_group)
        row = self._session.exec(query.order_by(col(LeafRow.version).desc()).limit(1)).first()
        return _leaf(row) if row else None

    def leaf_changes(self, task: str, *, after: int, upto: int) -> Iterator[LeafChange]:
        # A pool of a million is read piece by piece.
        options = {"yield_per": _ROWS_AT_ONCE}
        span = {"pool": task, "after": after, "upto": upto}
        for row in connection_of(self._session).execute(_LEAF_CHANGES, span, execution_options=options):
            yield _leaf(row)

    def forget_leaves(self, task: str) -> None:
        connection = connection_of(self._session)
        for table in (_LEAVES, _SEATS):
            connection.execute(table.delete().where(table.c.task == task))
        self._session.expire_all()

    def seat(self, task: str, participant: str, *, leaf_index: int, since: int) -> None:
        self._session.add(SeatRow(task=task, participant=participant, since=since, until=None, leaf_index=leaf_index))

    def unseat(self, task: str, participant: str, *, until: int) -> None:
        query = select(SeatRow).where(
            SeatRow.task == task, SeatRow.participant == participant, col(SeatRow.until).is_(None)
        )
        for row in self._session.exec(query):
            row.until = until
            self._session.add(row)

    def seated(self, task: str, *, leaf_indices: Collection[int], version: int) -> Mapping[int, Sequence[str]]:
        still = _SEATS.alias()
        # No join and no order: without statistics SQLite would begin with the seats of the whole pool for either.
        query = select(_SEATS.c.leaf_index, _SEATS.c.participant).where(
            _SEATS.c.task == task,
            _SEATS.c.leaf_index.in_(leaf_indices),
            _SEATS.c.since <= version,
            or_(_SEATS.c.until.is_(None), _SEATS.c.until > version),
            exists().where(
                still.c.task == _SEATS.c.task,
                still.c.participant == _SEATS.c.participant,
                still.c.until.is_(None),
            ),
        )
        members: dict[int, list[str]] = {index: [] for index in leaf_indices}
        for index, participant in connection_of(self._session).execute(query):
            members[index].append(participant)
        return {index: sorted(found) for index, found in members.items()}


def _pool(row: Row[Any]) -> Pool:
    return Pool(
        task=row.task,
        policy=Policy(
            curve=Curve(CurveKind(row.curve), row.alpha_millis),
            validator_min_stake_micros=row.validator_min_stake_micros,
            training_node_min_stake_micros=row.training_node_min_stake_micros,
            window=row.window_us * _MICROSECOND,
            limit=row.quota_limit,
            reference_stake_micros=row.reference_stake_micros,
        ),
        open_time=from_us(row.open_time_us),
        creator=row.creator,
        closed=row.closed,
        version=row.version,
        leaf_count=row.leaf_count,
        root=row.root,
    )


def _candidate(row: CandidateRow) -> Candidate:
    verdict = Verdict(
        task=row.task,
        participant=row.participant,
        role=Role(row.role),
        evidence=tuple(
            Evidence(
                kind=EvidenceKind(fact["kind"]),
                sufficient=fact["sufficient"],
                amount_micros=fact["amount_micros"],
                threshold_micros=fact["threshold_micros"],
                references=tuple(fact["references"]),
            )
            for fact in json.loads(row.evidence)
        ),
        explanation=row.explanation,
        decide_time=from_us(row.decide_time_us),
    )
    return Candidate(verdict, row.locked_micros, weight_of(row.weight), row.active)


def _evidence_json(fact: Evidence) -> dict[str, object]:
    return {
        "kind": fact.kind.value,
        "sufficient": fact.sufficient,
        "amount_micros": fact.amount_micros,
        "threshold_micros": fact.threshold_micros,
        "references": list(fact.references),
    }


def _leaf(row: LeafRow | Row[Any]) -> LeafChange:
    return LeafChange(row.leaf_index, row.version, row.owner_group, row.stake_micros, weight_of(row.weight))
