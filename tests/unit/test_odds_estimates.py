"""Estimates of odds, which take long, are made one at a time."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from services.runtime.auth import utc_now
from services.selector.odds_estimates import OddsEstimates
from services.selector.transaction import Store


class Readers:
    """A store that counts how many read at once, and answers when it is told to."""

    def __init__(self) -> None:
        self.reading = self.most = self.done = 0
        self.go_on = asyncio.Event()

    async def read(self, work: Callable[[Any], Any]) -> None:
        self.reading += 1
        self.most = max(self.most, self.reading)
        try:
            await self.go_on.wait()
            self.done += 1
        finally:
            self.reading -= 1


async def test_many_who_ask_for_their_odds_leave_readers_to_the_others() -> None:
    readers = Readers()
    estimates = OddsEstimates(cast(Store, readers), clock=utc_now)
    asked = [asyncio.create_task(estimates.estimate("t", participant="p", validators=3)) for _ in range(6)]
    await asyncio.sleep(0)
    # Who goes away leaves its turn to the next.
    asked[0].cancel()
    asked[3].cancel()
    readers.go_on.set()
    await asyncio.gather(*asked, return_exceptions=True)
    assert (readers.most, readers.done) == (1, 4)
