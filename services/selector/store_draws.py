"""Draws and charges in SQL."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Row, bindparam, select, update
from sqlmodel import Session

from services.runtime.engines import placeholder
from services.selector.columns import connection_of, from_us, insert_rows, table_of, to_us, weight_bytes, weight_of
from services.selector.records import Charge, Draw, DrawnPlace, PassedOverReason, Settlement
from services.selector.rows import ChargeRow, DrawRow, OwnerGroupRow, QuotaUseRow
from tiltyard.sortition import Curve, CurveKind, Place

_CHARGES = table_of(ChargeRow)
_GROUPS = table_of(OwnerGroupRow)
_DRAWS = table_of(DrawRow)
_DRAWN = select(_DRAWS).where(_DRAWS.c.draw.in_(bindparam("names", expanding=True)))
_PUT_PLACES = update(_DRAWS).where(_DRAWS.c.draw == bindparam("name")).values(places=bindparam("further"))
_MEMBERS = select(_GROUPS.c.participant, _GROUPS.c.owner_group).where(
    _GROUPS.c.owner_group.in_(bindparam("names", expanding=True))
)
_QUOTA_USES = table_of(QuotaUseRow)
_REFUND = (
    update(_QUOTA_USES)
    .where(
        _QUOTA_USES.c.task == bindparam("pool"),
        _QUOTA_USES.c.rate_window == bindparam("window"),
        _QUOTA_USES.c.participant == bindparam("name"),
    )
    .values(used=_QUOTA_USES.c.used - 1)
)
_USES = select(_QUOTA_USES.c.participant, _QUOTA_USES.c.used).where(
    _QUOTA_USES.c.task == bindparam("pool"),
    _QUOTA_USES.c.rate_window == bindparam("window"),
    _QUOTA_USES.c.participant.in_(bindparam("names", expanding=True)),
)


# Made once: json.dumps makes an encoder for each call that asks for other separators.
_to_json = json.JSONEncoder(separators=(",", ":")).encode


class SqlDrawRecords:
    """Implements DrawRecords."""

    _session: Session

    def draws(self, names: Collection[str]) -> Mapping[str, Draw]:
        rows = connection_of(self._session).execute(_DRAWN, {"names": list(names)})
        return {row.draw: _draw(row) for row in rows}

    def add_draws(self, draws: Sequence[Draw]) -> None:
        insert_rows(self._session, _DRAWS, [_draw_values(draw) for draw in draws])

    def put_places(self, draw: Draw) -> None:
        connection_of(self._session).execute(_PUT_PLACES, {"name": draw.draw, "further": _places_json(draw.places)})

    def charge(self, draw: str, participant: str) -> Charge | None:
        row = self._session.get(ChargeRow, (draw, participant))
        if row is None:
            return None
        return Charge(row.draw, row.participant, row.task, row.rate_window, Settlement(row.settlement))

    def add_charges(self, charges: Sequence[Charge]) -> None:
        insert_rows(self._session, _CHARGES, [_charge_values(charge) for charge in charges])
        used = Counter((charge.task, charge.window, charge.participant) for charge in charges)
        if used:
            connection = connection_of(self._session)
            connection.exec_driver_sql(_use_quota(placeholder(connection)), [(*key, used[key]) for key in used])

    def settle_charge(self, charge: Charge) -> None:
        self._session.merge(ChargeRow(**_charge_values(charge)))
        if charge.settlement is Settlement.REFUNDED:
            use = {"pool": charge.task, "window": charge.window, "name": charge.participant}
            connection_of(self._session).execute(_REFUND, use)

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


@cache
def _use_quota(mark: str) -> str:
    return (
        f"INSERT INTO quota_uses (task, rate_window, participant, used) VALUES ({', '.join([mark] * 4)}) "  # noqa: S608 - placeholders alone
        "ON CONFLICT (task, rate_window, participant) DO UPDATE SET used = quota_uses.used + excluded.used"
    )


def _draw_values(draw: Draw) -> dict[str, Any]:
    return {
        "draw": draw.draw,
        "task": draw.task,
        "submission": draw.submission,
        "round": draw.round,
        "anchor": draw.anchor,
        "sigma": draw.sigma,
        "reveal_salt": draw.reveal_salt,
        "seed": draw.seed,
        "pool_root": draw.pool_root,
        "pool_weight": weight_bytes(draw.pool_weight),
        "pool_size": draw.pool_size,
        "pool_version": draw.pool_version,
        "curve": draw.curve.kind.value,
        "alpha_millis": draw.curve.alpha_millis,
        "assigned": draw.assigned,
        "submitter": draw.submitter,
        "places": _places_json(draw.places),
        "draw_time_us": to_us(draw.draw_time),
    }


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
    return _to_json([_place_json(place) for place in places])


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
