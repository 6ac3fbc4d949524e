"""Accounts, deposits, unbonding stake, punishments and events in SQL."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import bindparam, text
from sqlmodel import Session, col, func, select

from services.selector.columns import connection_of, from_us, insert_rows, table_of, to_us, weight_bytes, weight_of
from services.selector.records import Accounts, Deposit, EventKind, LedgerEvent, Slash, Unbonding
from services.selector.rows import AccountsRow, DepositRow, EventRow, SlashRow, UnbondingRow
from tiltyard.faults import Fault

_EVENTS = table_of(EventRow)
_UNBONDINGS = table_of(UnbondingRow)
_WAITING = (
    _UNBONDINGS.select()
    .where(_UNBONDINGS.c.participant.in_(bindparam("names", expanding=True)), _UNBONDINGS.c.amount_micros > 0)
    .order_by(_UNBONDINGS.c.release_time_us, _UNBONDINGS.c.number)
)
# Of a pool of a million, in two statements.
_UNLOCK = text(
    "UPDATE accounts SET available_micros = available_micros + held.micros, "
    "locked_micros = accounts.locked_micros - held.micros "
    "FROM (SELECT participant AS holder, locked_micros AS micros FROM candidates WHERE task = :task AND active) held "
    "WHERE participant = held.holder AND held.micros > 0"
)
_TELL_UNLOCKED = text(
    "INSERT INTO ledger_events (sequence, kind, time_us, participant, amount_micros, task, draw, owner_group, weight, "
    "reference, funding_account, fault) "
    "SELECT :last + row_number() OVER (ORDER BY participant), :kind, :now_us, participant, locked_micros, task, '', "
    "'', :weight, '', '', '' FROM candidates WHERE task = :task AND active AND locked_micros > 0"
)
_LAST_SEQUENCE = select(func.max(_EVENTS.c.sequence))


class SqlStakeRecords:
    """Implements StakeRecords."""

    _session: Session
    _sequence: int | None = None
    """The last event's number, once it is known: nobody else appends to a transaction's snapshot."""

    def accounts(self, participant: str) -> Accounts:
        row = self._session.get(AccountsRow, participant)
        return _accounts(row) if row else Accounts(participant)

    def put_accounts(self, accounts: Accounts) -> None:
        self._session.merge(
            AccountsRow(
                participant=accounts.participant,
                available_micros=accounts.available_micros,
                locked_micros=accounts.locked_micros,
                unbonding_micros=accounts.unbonding_micros,
                slashed_micros=accounts.slashed_micros,
            )
        )

    def list_accounts(self, *, after: str, limit: int) -> Sequence[Accounts]:
        query = select(AccountsRow).where(AccountsRow.participant > after).order_by(AccountsRow.participant)
        return [_accounts(row) for row in self._session.exec(query.limit(limit))]

    def deposit(self, reference: str) -> Deposit | None:
        row = self._session.get(DepositRow, reference)
        if row is None:
            return None
        return Deposit(row.reference, row.participant, row.amount_micros, row.funding_account)

    def add_deposit(self, deposit: Deposit) -> None:
        last = self._last_deposit()
        self._session.add(
            DepositRow(
                reference=deposit.reference,
                number=last.number + 1 if last else 1,
                participant=deposit.participant,
                amount_micros=deposit.amount_micros,
                funding_account=deposit.funding_account,
                total_micros=deposit.amount_micros + (last.total_micros if last else 0),
            )
        )

    def total_deposited(self) -> int:
        last = self._last_deposit()
        return last.total_micros if last else 0

    def unbondings(self, participant: str) -> Sequence[Unbonding]:
        return self.unbondings_of([participant])[participant]

    def unbondings_of(self, participants: Collection[str]) -> Mapping[str, Sequence[Unbonding]]:
        found: dict[str, list[Unbonding]] = {participant: [] for participant in participants}
        for row in connection_of(self._session).execute(_WAITING, {"names": list(found)}):
            waiting = Unbonding(row.participant, row.number, row.amount_micros, from_us(row.release_time_us))
            found[row.participant].append(waiting)
        return found

    def add_unbonding(self, participant: str, amount_micros: int, release_time: datetime) -> None:
        query = select(func.max(UnbondingRow.number)).where(UnbondingRow.participant == participant)
        self._session.add(
            UnbondingRow(
                participant=participant,
                number=(self._session.exec(query).one() or 0) + 1,
                amount_micros=amount_micros,
                release_time_us=to_us(release_time),
            )
        )

    def put_unbonding(self, unbonding: Unbonding) -> None:
        self._session.merge(
            UnbondingRow(
                participant=unbonding.participant,
                number=unbonding.number,
                amount_micros=unbonding.amount_micros,
                release_time_us=to_us(unbonding.release_time),
            )
        )

    def slash(self, participant: str, evidence: str) -> Slash | None:
        row = self._session.get(SlashRow, (participant, evidence))
        return Slash(participant, evidence, Fault(row.fault), row.taken_micros) if row else None

    def add_slash(self, slash: Slash) -> None:
        self._session.add(
            SlashRow(
                participant=slash.participant,
                evidence=slash.evidence,
                fault=slash.fault.value,
                taken_micros=slash.taken_micros,
            )
        )

    def unlock_all(self, task: str, now: datetime) -> None:
        connection, last = connection_of(self._session), self.last_sequence()
        told = {
            "task": task,
            "last": last,
            "kind": EventKind.UNLOCKED.value,
            "now_us": to_us(now),
            "weight": weight_bytes(0),
        }
        connection.execute(_UNLOCK, {"task": task})
        self._sequence = last + connection.execute(_TELL_UNLOCKED, told).rowcount
        self._session.expire_all()

    def append_events(self, events: Sequence[LedgerEvent]) -> None:
        if not events:
            return
        rows = [
            {
                "sequence": sequence,
                "kind": event.kind.value,
                "time_us": to_us(event.time),
                "participant": event.participant,
                "amount_micros": event.amount_micros,
                "task": event.task,
                "draw": event.draw,
                "owner_group": event.owner_group,
                "weight": weight_bytes(event.weight),
                "reference": event.reference,
                "funding_account": event.funding_account,
                "fault": event.fault.value if event.fault else "",
            }
            for sequence, event in enumerate(events, self.last_sequence() + 1)
        ]
        insert_rows(self._session, _EVENTS, rows)
        self._sequence = self.last_sequence() + len(rows)

    def last_sequence(self) -> int:
        if self._sequence is None:
            self._sequence = connection_of(self._session).execute(_LAST_SEQUENCE).scalar() or 0
        return self._sequence

    def list_events(self, *, start: int, limit: int) -> Sequence[LedgerEvent]:
        query = select(EventRow).where(EventRow.sequence >= start).order_by(col(EventRow.sequence)).limit(limit)
        return [
            LedgerEvent(
                kind=EventKind(row.kind),
                time=from_us(row.time_us),
                participant=row.participant,
                amount_micros=row.amount_micros,
                task=row.task,
                draw=row.draw,
                owner_group=row.owner_group,
                weight=weight_of(row.weight),
                reference=row.reference,
                funding_account=row.funding_account,
                fault=Fault(row.fault) if row.fault else None,
                sequence=row.sequence,
            )
            for row in self._session.exec(query)
        ]

    def _last_deposit(self) -> DepositRow | None:
        return self._session.exec(select(DepositRow).order_by(col(DepositRow.number).desc()).limit(1)).first()


def _accounts(row: AccountsRow) -> Accounts:
    return Accounts(
        participant=row.participant,
        available_micros=row.available_micros,
        locked_micros=row.locked_micros,
        unbonding_micros=row.unbonding_micros,
        slashed_micros=row.slashed_micros,
    )
