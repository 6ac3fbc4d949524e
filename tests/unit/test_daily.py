"""Daily counts: what strangers of one address, all of them, and one participant may cause."""

import contextvars
from collections.abc import Callable

import pytest

from services.runtime.auth import Caller, Role, set_caller
from services.runtime.daily import Daily, DailyLimits
from services.runtime.errors import ResourceExhausted

DAY_S = 86_400


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def calling(
    action: Callable[[], None], *, address: str = "10.0.0.1", name: str = "a", role: Role | None = None
) -> None:
    """The action within a call of this caller."""
    roles = frozenset({Role.PARTICIPANT} if role is None else {Role.PARTICIPANT, role})

    def call() -> None:
        set_caller(Caller(name, b"", roles), address)
        action()

    contextvars.Context().run(call)


def refusal(action: Callable[[], None], **caller: str) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as refused:
        calling(action, **caller)  # type: ignore[arg-type]
    return refused.value


def test_strangers_are_counted_by_address_whatever_their_keys() -> None:
    clock = Clock()
    daily = Daily(DailyLimits(2, 100, 100), clock=clock)
    for name in ("a", "b"):
        calling(daily.count_stranger, name=name)
    refused = refusal(daily.count_stranger, name="c")
    assert (refused.reason, refused.retry_after_s) == ("STRANGERS_PER_DAY_PER_ADDRESS", DAY_S / 2)
    calling(daily.count_stranger, name="c", address="10.0.0.2")
    clock.now_s += DAY_S / 2
    calling(daily.count_stranger, name="c")
    refusal(daily.count_stranger, name="c")


def test_who_asks_in_vain_takes_nothing_from_other_addresses() -> None:
    daily = Daily(DailyLimits(1, 2, 100), clock=Clock())
    calling(daily.count_stranger)
    for _ in range(10):
        refusal(daily.count_stranger)
    calling(daily.count_stranger, address="10.0.0.2")
    assert refusal(daily.count_stranger, address="10.0.0.3").reason == "STRANGERS_PER_DAY"


def test_changes_are_counted_by_participant() -> None:
    daily = Daily(DailyLimits(1, 1, 2), clock=Clock())
    for address in ("10.0.0.1", "10.0.0.2"):
        calling(daily.count_change, address=address)
    refused = refusal(daily.count_change, address="10.0.0.3")
    assert (refused.reason, refused.retry_after_s) == ("CHANGES_PER_DAY", DAY_S / 2)
    calling(daily.count_change, name="b")


def test_operators_unix_sockets_and_the_background_are_not_counted() -> None:
    daily = Daily(DailyLimits(1, 1, 1), clock=Clock())
    for _ in range(3):
        calling(daily.count_stranger, role=Role.OPERATOR)
        calling(daily.count_change, role=Role.OPERATOR)
        calling(daily.count_stranger, address="")
        contextvars.Context().run(daily.count_stranger)
        contextvars.Context().run(daily.count_change)
    calling(daily.count_stranger)
    refusal(daily.count_stranger)


def test_zero_stands_for_any_number() -> None:
    daily = Daily(DailyLimits(0, 0, 0), clock=Clock())
    for _ in range(3):
        calling(daily.count_stranger)
        calling(daily.count_change)
