"""What passes is waited for, and said once."""

import pytest
from structlog.testing import capture_logs

from services.runtime.errors import InvalidArgument, Unavailable
from services.validator import patience


async def test_a_reason_is_logged_when_it_comes_and_not_at_every_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    reasons = iter(["AWAY"] * 50 + ["FULL"] * 50 + ["AWAY"] * 50)

    async def call() -> str:
        if reason := next(reasons, ""):
            raise Unavailable(reason, "not now")
        return "done"

    with capture_logs() as lines:
        assert await patience.persist(call, "renew") == "done"
    assert [(line["call"], line["reason"]) for line in lines] == [("renew", each) for each in ("AWAY", "FULL", "AWAY")]


async def test_what_does_not_pass_is_raised_at_once() -> None:
    async def call() -> None:
        raise InvalidArgument.field("name", "is wrong")

    with capture_logs() as lines, pytest.raises(InvalidArgument):
        await patience.persist(call, "renew")
    assert lines == []
