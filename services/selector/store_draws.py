"""Draws and charges in SQL."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, bindparam, func, insert, or_, select, update
from sqlmodel import Session

from services.selector.columns import connection_of, from_us, table_of, to_us, weight_bytes, weight_of
from services.selector.records import Charge, Draw, DrawnPlace, PassedOverReason, Seat, Settlement
from services.selector.rows import ChargeRow, DrawRow, OwnerGroupRow, SeatRow
from tiltyard.sortition import Curve, CurveKind, Place

_CHARGES = table_of(ChargeRow)
_GROUPS = table_of(OwnerGroupRow)
_DRAWS = table_of(DrawRow)
_DRAW = select(_DRAWS).where(_DRAWS.c.draw == bindparam("name"))
_ADD_DRAW = insert(_DRAWS)
_CHARGE = insert(_CHARGES)
_PUT_PLACES = update(_DRAWS).where(_DRAWS.c.draw == bindparam("name")).values(places=bindparam("further"))
_IS_CHARGED = (
    _CHARGES.c.task == bindparam("pool"),
    _CHARGES.c.rate_window == bindparam("window"),
    _CHARGES.c.settlement != Settlement.REFUNDED.value,
)
_MEMBERS = select(_GROUPS.c.participant, _GROUPS.c.owner_group).where(
    _GROUPS.c.owner_group.in_(bindparam("names", expanding=True))
)
_USES = (
    select(_CHARGES.c.participant, func.count())
    .where(*_IS_CHARGED, _CHARGES.c.participant.in_(bindparam("names", expanding=True)))
    .group_by(_CHARGES.c.participant)
)
_SEATS = table_of(SeatRow)
_STILL = _SEATS.alias()
_SEATED = (
    select(
        _SEATS.c.leaf_index,
        _SEATS.c.participant,
        _GROUPS.c.owner_group,
        select(func.count())
        .select_from(_CHARGES)
        .where(*_IS_CHARGED, _CHARGES.c.participant == _SEATS.c.participant)
        .scalar_subquery(),
    )
    .join(_STILL, (_STILL.c.task == _SEATS.c.task) & (_STILL.c.participant == _SEATS.c.participant))
    .outerjoin(_GROUPS, _GROUPS.c.participant == _SEATS.c.participant)
    .where(
        _SEATS.c.task == bindparam("pool"),
        _SEATS.c.leaf_index.in_(bindparam("indices", expanding=True)),
        _SEATS.c.since <= bindparam("version"),
        or_(_SEATS.c.until.is_(None), _SEATS.c.until > bindparam("version")),
        _STILL.c.until.is_(None),
    )
    .order_by(_SEATS.c.participant)
)


class SqlDrawRecords:
    """Implements DrawRecords."""

    _session: Session

    def draw(self, draw: str) -> Draw | None:
        row = connection_of(self._session).execute(_DRAW, {"name": draw}).one_or_none()
        return _draw(row) if row else None

    def add_draw(self, draw: Draw) -> None:
        connection_of(self._session).execute(
            _ADD_DRAW,
            dict(
                draw=draw.draw,
                task=draw.task,
                submission=draw.submission,
                round=draw.round,
                anchor=draw.anchor,
                sigma=draw.sigma,
                reveal_salt=draw.reveal_salt,
                seed=draw.seed,
                pool_root=draw.pool_root,
                pool_weight=weight_bytes(draw.pool_weight),
                pool_size=draw.pool_size,
                pool_version=draw.pool_version,
                curve=draw.curve.kind.value,
                alpha_millis=draw.curve.alpha_millis,
                assigned=draw.assigned,
                submitter=draw.submitter,
                places=_places_json(draw.places),
                draw_time_us=to_us(draw.draw_time),
            ),
        )

    def put_places(self, draw: Draw) -> None:
        connection_of(self._session).execute(_PUT_PLACES, {"name": draw.draw, "further": _places_json(draw.places)})

    def charge(self, draw: str, participant: str) -> Charge | None:
        row = self._session.get(ChargeRow, (draw, participant))
        if row is None:
            return None
        return Charge(row.draw, row.participant, row.task, row.rate_window, Settlement(row.settlement))

    def add_charges(self, charges: Sequence[Charge]) -> None:
        if charges:
            connection_of(self._session).execute(_CHARGE, [_charge_values(charge) for charge in charges])

    def put_charge(self, charge: Charge) -> None:
        self._session.merge(ChargeRow(**_charge_values(charge)))

    def quota_used(self, task: str, *, window: int, owner_groups: Collection[str]) -> Mapping[str, int]:
        connection = connection_of(self._session)
        # Whoever stands alone bears its group's id; all members of a group of several have a row.
        members = connection.execute(_MEMBERS, {"names": list(owner_groups)})
        group_of = {group: group for group in owner_groups} | {participant: group for participant, group in members}
        used = dict.fromkeys(owner_groups, 0)
        span = {"pool": task, "window": window, "names": list(group_of)}
        for participant, number in connection.execute(_USES, span):
            used[group_of[participant]] += number
        return used

    def seats(self, task: str, *, leaf_indices: Collection[int], version: int, window: int) -> Sequence[Seat]:
        question = {"pool": task, "indices": list(leaf_indices), "version": version, "window": window}
        rows = connection_of(self._session).execute(_SEATED, question)
        return [
            Seat(index, participant, group or participant, group is None, used)
            for index, participant, group, used in rows
        ]


def _charge_values(charge: Charge) -> dict[str, Any]:
    return {
        "draw": charge.draw,
        "participant": charge.participant,
        "task": charge.task,
        "rate_window": charge.window,
        "settlement": charge.settlement.value,
    }


def _draw(row: Row[Any]) -> Draw:
    return Draw(
        draw=row.draw,
        task=row.task,
        submission=row.submission,
        round=row.round,
        anchor=row.anchor,
        sigma=row.sigma,
        reveal_salt=row.reveal_salt,
        seed=row.seed,
        pool_root=row.pool_root,
        pool_weight=weight_of(row.pool_weight),
        pool_size=row.pool_size,
        pool_version=row.pool_version,
        curve=Curve(CurveKind(row.curve), row.alpha_millis),
        assigned=row.assigned,
        submitter=row.submitter,
        places=tuple(_place(place) for place in json.loads(row.places)),
        draw_time=from_us(row.draw_time_us),
    )


def _places_json(places: Sequence[DrawnPlace]) -> str:
    return json.dumps([_place_json(place) for place in places], separators=(",", ":"))


def _place_json(drawn: DrawnPlace) -> dict[str, Any]:
    """Weights as decimal strings: they outgrow the numbers that other readers of JSON can hold."""
    place = drawn.place
    return {
        "place": place.place,
        "leaf_index": place.leaf_index,
        "weight": str(place.weight),
        "value": str(place.value),
        "owner_group": drawn.owner_group,
        "path": drawn.path.hex(),
        "members": list(drawn.members),
        "participant": drawn.participant,
        "passed_over": drawn.passed_over.value if drawn.passed_over else None,
    }


def _place(stored: dict[str, Any]) -> DrawnPlace:
    reason = stored["passed_over"]
    return DrawnPlace(
        place=Place(stored["place"], stored["leaf_index"], int(stored["weight"]), int(stored["value"])),
        owner_group=stored["owner_group"],
        path=bytes.fromhex(stored["path"]),
        members=tuple(stored["members"]),
        participant=stored["participant"],
        passed_over=PassedOverReason(reason) if reason else None,
    )
