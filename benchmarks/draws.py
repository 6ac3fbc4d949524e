"""Draws: the pure algorithm beside numpy, what proofs and changes of a pool cost, and `DrawValidators` over gRPC.

Ours and theirs take turns in one run, and medians are shown. The pure parts count CPU time of one thread, the calls are
answers a second with 16 in flight: the selector's draws of 5 from 1000 are proved, signed, charged and committed, while
the bare server commits a row and echoes the request. No draw can do without one BLS signature over its anchor, so a
second bare method makes one, too: that is the limit.
"""

import asyncio
import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from tiltyard.bls import BlsKey
from tiltyard.calls.channel import open_channel
from tiltyard.identity import Key, TokenSource
from tiltyard.selector.v1 import draw_pb2, draw_pb2_grpc, pool_pb2, pool_pb2_grpc, stake_pb2, stake_pb2_grpc
from tiltyard.sortition import SumTree, draw
from tiltyard.type.v1 import participation_pb2, task_pb2

_PICKS = 5
_SIZES = {10_000: 2.0, 100_000: 20.0, 1_000_000: 200.0}
_TURNS = 21
_NODE = bytes(97)  # as long as what is hashed for one node of the tree
_MEMORY_LEAVES = 1_000_000
_MEMORY_GOAL_MB = 500
_IN_FLIGHT = 16
_ROUNDS = 15
_ROUND_S = 0.5
_VALIDATORS = 1000
_MINIMUM = 1_000_000
_BARE = "/benchmark.v1.Draws/"


def run() -> list[dict[str, Any]]:
    """All rows."""
    results = []
    for size, goal in _SIZES.items():
        results += _algorithm(size, goal)
    results.append(_memory())
    results += _calls()
    return results


def _algorithm(size: int, goal: float) -> list[dict[str, Any]]:
    chance = random.Random(size)
    weights = [chance.randrange(2**32, 2**36) for _ in range(size)]
    tree = SumTree((f"{index:040x}", weight) for index, weight in enumerate(weights))
    tree.root()
    shares = np.array(weights, dtype=float) / sum(weights)
    generator = np.random.default_rng(1)
    seeds = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(200)]
    picks = [[place.leaf_index for place in islice(draw(seed, tree), _PICKS)] for seed in seeds]

    def one_draw(turn: int) -> object:
        return list(islice(draw(seeds[turn % 200], tree), _PICKS))

    def choice(_turn: int) -> object:
        return generator.choice(size, _PICKS, replace=False, p=shares)

    def proofs(turn: int) -> object:
        return [tree.path(index) for index in picks[turn % 200]]

    def change(turn: int) -> object:
        tree.set_weight((turn * 7919) % size, 2**33 + turn)
        return tree.root()

    def hashing(_turn: int) -> object:
        for _ in range(100):
            hashlib.sha256(_NODE).digest()
        return None

    name = f"draw of {_PICKS} from {size:,}"
    results = [
        _compare(
            name, one_draw, "numpy choice(replace=False, p)", choice, goal, repeats=(200, max(1, 200_000 // size))
        ),
        _compare(f"proofs of a {name}", proofs, "10 such draws", lambda turn: [one_draw(turn) for _ in range(10)], 1.0),
    ]
    if size == max(_SIZES):
        results.append(
            _compare(f"weight change and root, {size:,} leaves", change, "100 SHA-256 of 97 bytes", hashing, 1.0)
        )
    return results


def _compare(
    name: str,
    ours: Callable[[int], object],
    against: str,
    theirs: Callable[[int], object],
    goal: float,
    *,
    repeats: tuple[int, int] = (100, 100),
) -> dict[str, Any]:
    """Rates of both, and how many times theirs ours is: medians over turns."""
    pairs = [(_rate(ours, repeats[0]), _rate(theirs, repeats[1])) for _ in range(_TURNS)]
    return {
        "name": name,
        "ours": median(mine for mine, _ in pairs),
        "unit": "/s",
        "against": against,
        "theirs": median(other for _, other in pairs),
        "ratio": median(mine / other for mine, other in pairs),
        "goal": goal,
    }


def _rate(work: Callable[[int], object], repeats: int) -> float:
    started = time.thread_time()
    for turn in range(repeats):
        work(turn)
    return repeats / (time.thread_time() - started)


def _memory() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks._pool_memory", str(_MEMORY_LEAVES)]
    peak_mb = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "name": f"selector with a pool of {_MEMORY_LEAVES:,}",
        "ours": peak_mb,
        "unit": "MB at its peak",
        "against": "the goal, in MB",
        "theirs": float(_MEMORY_GOAL_MB),
        "ratio": _MEMORY_GOAL_MB / peak_mb,
        "goal": 1.0,
    }


# Calls


def _calls() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as processes:
        folder = Path(name)
        keys = {role: Key.generate() for role in ("operator", "service")}
        settings = {
            "TILTYARD_LISTEN": f"unix:{folder}/ours.sock",
            "TILTYARD_STATE_DIR": str(folder / "state"),
            "TILTYARD_OPERATORS": keys["operator"].id,
            "TILTYARD_SERVICES": keys["service"].id,
            "TILTYARD_VALIDATOR_MIN_STAKE_MICROS": str(_MINIMUM),
            "TILTYARD_LOG_LEVEL": "warning",
        }
        processes.enter_context(_process(["-m", "services.selector"], settings, folder / "ours.log"))
        processes.enter_context(_process(["-m", __name__, str(folder)], {}, folder / "bare.log"))
        rounds = asyncio.run(_measure(folder, keys))
    against = (("one SQLite commit each", 0.5), ("one SQLite commit and one BLS signature each", None))
    return [
        {
            "name": f"DrawValidators of {_PICKS} from {_VALIDATORS}, durable",
            "ours": median(rates[0] for rates in rounds),
            "unit": "calls/s",
            "against": f"bare grpc.aio echo, {work}",
            "theirs": median(rates[column] for rates in rounds),
            "ratio": median(rates[0] / rates[column] for rates in rounds),
            "goal": goal,
        }
        for column, (work, goal) in enumerate(against, start=1)
    ]


@contextmanager
def _process(arguments: list[str], settings: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *arguments], env=os.environ | settings, stdout=file, stderr=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _measure(folder: Path, keys: dict[str, Key]) -> list[tuple[float, float, float]]:
    """Rates of the selector's draws, of the bare server, and of the bare server that signs, in turns."""
    audience = "tiltyard.local/selector"
    address = f"unix:{folder}/ours.sock"
    async with (
        open_channel(address, tokens=TokenSource(keys["operator"], audience)) as operator,
        open_channel(address, tokens=TokenSource(keys["service"], audience)) as service,
        grpc.aio.insecure_channel(f"unix:{folder}/bare.sock") as bare,
    ):
        await asyncio.wait_for(asyncio.gather(operator.channel_ready(), bare.channel_ready()), 60)
        await _fill(operator, service)
        numbers = count(1)
        ours = _draw_call(service, numbers)
        committed, signed = _bare_call(bare, "Commit", numbers), _bare_call(bare, "CommitAndSign", numbers)
        for call in (ours, committed, signed):
            await call()
        return [
            (await _calls_per_s(ours), await _calls_per_s(committed), await _calls_per_s(signed))
            for _ in range(_ROUNDS)
        ]


async def _fill(operator: grpc.aio.Channel, service: grpc.aio.Channel) -> None:
    """A pool with validators of 1 to 50 times the minimum, whom no quota holds up."""
    stakes: Any = stake_pb2_grpc.StakeServiceStub(operator)
    pools: Any = pool_pb2_grpc.PoolServiceStub(service)
    policy = task_pb2.SelectionPolicy(rate=task_pb2.ValidatorRate(limit=2**31 - 1))
    await pools.OpenPool(
        pool_pb2.OpenPoolRequest(
            task="tasks/t", policy=policy, open_time=Timestamp(seconds=int(time.time())), creator=_someone(0)
        ),
        wait_for_ready=True,
    )

    async def enter(number: int) -> None:
        participant = _someone(number)
        await stakes.Deposit(
            stake_pb2.DepositRequest(
                participant=participant,
                amount_micros=_MINIMUM * (1 + number % 50),
                reference=str(number),
                funding_account=str(number),
            )
        )
        await pools.AddCandidate(
            pool_pb2.AddCandidateRequest(task="tasks/t", participant=participant, role=participation_pb2.ROLE_VALIDATOR)
        )

    for first in range(1, _VALIDATORS + 1, 50):
        await asyncio.gather(*(enter(number) for number in range(first, first + 50)))


def _someone(number: int) -> str:
    return "participants/" + hashlib.sha256(str(number).encode()).hexdigest()[:40]


def _request(number: int) -> draw_pb2.DrawValidatorsRequest:
    return draw_pb2.DrawValidatorsRequest(
        submission=f"tasks/t/submissions/{number}",
        round=1,
        anchor=hashlib.sha256(str(number).encode()).digest(),
        reveal_salt=bytes(32),
        validators=_PICKS,
        submitter=_someone(0),
    )


def _draw_call(channel: grpc.aio.Channel, numbers: Iterator[int]) -> Callable[[], Awaitable[object]]:
    stub: Any = draw_pb2_grpc.DrawServiceStub(channel)

    def call() -> Awaitable[object]:
        answer: Awaitable[object] = stub.DrawValidators(_request(next(numbers)))
        return answer

    return call


def _bare_call(channel: grpc.aio.Channel, name: str, numbers: Iterator[int]) -> Callable[[], Awaitable[object]]:
    method = channel.unary_unary(
        _BARE + name, draw_pb2.DrawValidatorsRequest.SerializeToString, draw_pb2.DrawValidatorsRequest.FromString
    )
    return lambda: method(_request(next(numbers)), timeout=20)


async def _calls_per_s(call: Callable[[], Awaitable[object]]) -> float:
    started = time.perf_counter()
    end = started + _ROUND_S

    async def repeat() -> int:
        answered = 0
        while time.perf_counter() < end:
            await call()
            answered += 1
        return answered

    answered = sum(await asyncio.gather(*(repeat() for _ in range(_IN_FLIGHT))))
    return answered / (time.perf_counter() - started)


async def _serve_bare(folder: Path) -> None:
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    for statement in (
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",
        "CREATE TABLE draws (number INTEGER PRIMARY KEY, submission TEXT, anchor BLOB)",
    ):
        connection.execute(statement)

    key = BlsKey(bytes(range(32)))

    async def commit(request: draw_pb2.DrawValidatorsRequest, _context: object) -> draw_pb2.DrawValidatorsRequest:
        # Outside of a transaction each statement is one, and durable when it returns.
        connection.execute("INSERT INTO draws (submission, anchor) VALUES (?, ?)", (request.submission, request.anchor))
        return request

    async def commit_and_sign(
        request: draw_pb2.DrawValidatorsRequest, context: object
    ) -> draw_pb2.DrawValidatorsRequest:
        await asyncio.to_thread(key.sign, request.anchor)
        return await commit(request, context)

    methods = {
        name: grpc.unary_unary_rpc_method_handler(
            work, draw_pb2.DrawValidatorsRequest.FromString, draw_pb2.DrawValidatorsRequest.SerializeToString
        )
        for name, work in (("Commit", commit), ("CommitAndSign", commit_and_sign))
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("benchmark.v1.Draws", methods)])
    server.add_insecure_port(f"unix:{folder}/bare.sock")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve_bare(Path(sys.argv[1])))
