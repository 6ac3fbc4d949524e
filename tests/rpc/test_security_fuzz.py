"""Random mutations of valid requests to every method of every service: no defect shows, and no state without a leaf."""

import asyncio
import collections
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.support.asked_arena import ENDING, Asked, arena_in
from tests.support.mutations import Mutator
from tests.support.state_of_logs import registry_differences, selector_differences
from tests.support.whole_arena import WholeArena
from tiltyard.audit import audit
from tiltyard.audit.download import fetch_record
from tiltyard.calls.channel import open_channel
from tiltyard.identity import TokenSource
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc
from tiltyard.type.v1 import stake_pb2 as types_pb2

QUICK = 2000
SOAK = int(os.environ.get("TILTYARD_FUZZ_MUTATIONS", "100000"))
AT_ONCE = 16

# Everything else would be a defect, or a caller's misfortune that no request may cause.
ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "OPEN",  # a stream that goes on
}


class Fuzz:
    """Mutants of the arena's valid requests, and what was answered."""

    def __init__(self, asked: Asked, seed: int) -> None:
        self._asked = asked
        self._mutator = Mutator(seed, asked.names())
        self.answers: collections.Counter[tuple[str, str]] = collections.Counter()

    async def mutate(self, paths: list[str], number: int) -> None:
        """`number` mutants of these methods, several at once."""

        async def one() -> None:
            path = self._mutator.random.choice(paths)
            server, who, valid = self._asked.seeds[path]
            if self._mutator.random.random() < 0.1:
                who = self._mutator.random.choice(list(self._asked.arena.keys))
            if server == "selector" and self._mutator.random.random() < 0.5:
                server = "selector-2"
            key = self._asked.arena.keys[who]
            requests = [self._mutator.mutant(valid, key)]
            while self._asked.methods[path].client_streaming and self._mutator.random.random() < 0.6:
                requests.append(self._mutator.mutant(valid, key))
            code = await self._asked.send(path, server, who, requests)
            self.answers[path, code] += 1

        left = number

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await one()

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


async def ledger_of(arena: WholeArena, name: str) -> list[types_pb2.LedgerEvent]:
    """All events of a selector."""
    endpoint = arena.endpoints[name]
    events: list[types_pb2.LedgerEvent] = []
    tokens = TokenSource(arena.keys["operator"], endpoint.audience)
    async with open_channel(endpoint.address, tokens=tokens) as channel:
        stakes = stake_pb2_grpc.StakeServiceStub(channel)
        while True:
            request = stake_pb2.ListLedgerEventsRequest(start_sequence=len(events) + 1, page_size=1000)
            page = (await stakes.ListLedgerEvents(request)).events
            if not page:
                return events
            events += page


async def send_mutants(folder: Path, number: int, seed: int) -> None:
    """Sends mutants of `seed`. They are the same each time; in which order they arrive is not."""
    with capture_logs() as logs:
        async with arena_in(folder) as arena:
            asked = Asked(arena)
            fuzz = Fuzz(asked, seed)
            valid = await asked.send_valid()
            fuzz.answers.update(valid.items())
            ending = [path for path in asked.methods if path.rpartition("/")[2] in ENDING]
            await fuzz.mutate([path for path in asked.methods if path not in ending], number * 9 // 10)
            await fuzz.mutate(ending, number - number * 9 // 10)
            await asked.close()
            await arena.settle()
            record = await fetch_record(arena.client("node"))
            checked = audit(record, log_key=arena.registry.log_key)
            databases = arena.databases()
            differences = registry_differences(record, databases["registry"])
            for name in ("selector", "selector-2"):
                differences += selector_differences(await ledger_of(arena, name), databases[name])
    defects = [entry for entry in logs if entry["log_level"] == "error" or entry.get("code") in ("INTERNAL", "UNKNOWN")]
    assert not defects, (seed, defects[:3])
    wrong = {answer: count for answer, count in fuzz.answers.items() if answer[1] not in ANSWERS}
    assert not wrong, (seed, wrong)
    assert not checked.failures, (seed, checked.failures[:5])
    assert not differences, (seed, differences[:5])
    # The mutants reach what valid requests reach: most methods take their seed, and all were asked.
    accepted = {path for path, code in valid.items() if code in ("OK", "OPEN")}
    assert len(accepted) > len(asked.methods) / 2, sorted(set(asked.methods) - accepted)
    assert {path for path, _ in fuzz.answers} == set(asked.methods)


async def test_two_thousand_mutations_of_valid_requests_find_no_defect(tmp_path: Path) -> None:
    await send_mutants(tmp_path, QUICK, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_a_hundred_thousand_mutations_of_valid_requests_find_no_defect(tmp_path: Path) -> None:
    await send_mutants(tmp_path, SOAK, seed=int.from_bytes(os.urandom(4), "big"))
