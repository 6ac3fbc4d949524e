"""What messages take of a server's memory on their way in and out, so that nobody takes what the others need."""

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from weakref import WeakValueDictionary

from services.runtime.errors import ResourceExhausted

LARGE_BYTES = 65_536
"""What of a message is too little to count."""
_MOST_UNREAD = 32
_MOST_READ = 64
_MOST_HELD_BYTES = 256 * 1024 * 1024
_AGAIN_AFTER_S = 1.0

Turn = AbstractAsyncContextManager[None]
LetGo = Callable[..., None]


class MessageRoom:
    """The room for messages by the address at the other end; None is one without limits.

    A message takes memory before it is whole: of one address 64 come in at a time. And as long as nobody takes an
    answer it lies here, and its call's only request with it: 256 MiB of large ones from and to one address may.
    """

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._held: Counter[str] = Counter()

    def turn(self, address: str | None) -> Turn:
        """What is held while a message of a stream comes in; each message has its own turn."""
        if address is None:
            return contextlib.nullcontext()
        turns = self._turns.get(address)
        if turns is None:
            turns = self._turns[address] = asyncio.Semaphore(_MOST_READ)
        return turns

    def hold(self, address: str | None, size_bytes: int) -> LetGo:
        """Room for a large message; what it returns is to be called when that lies here no more.

        Raises ResourceExhausted (MESSAGES_PER_ADDRESS).
        """
        if address is None:
            return _nothing
        if self._held[address] + size_bytes > _MOST_HELD_BYTES:
            held = (
                f"calls of your address hold {self._held[address]} bytes of messages here until they have been answered"
            )
            raise ResourceExhausted("MESSAGES_PER_ADDRESS", held, retry_after_s=_AGAIN_AFTER_S)
        self._held[address] += size_bytes
        return functools.partial(self._let_go, address, size_bytes)

    def _let_go(self, address: str, size_bytes: int, *_: object) -> None:
        self._held[address] -= size_bytes
        if not self._held[address]:
            del self._held[address]


def _nothing(*_: object) -> None:
    pass


class UnreadCalls:
    """The calls that gRPC has begun and whose only message it waits for, before it asks anything of ours.

    There may be 32 at a time. A caller that held more of them would be counted nowhere, and could take a server's whole
    room by calls that say nothing: any further ones are to be read as streams.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any] | None] = set()

    def add(self) -> bool:
        """Whether the current task's call may be one of them; it is until `read`, or until the task is done."""
        if len(self._tasks) >= _MOST_UNREAD:
            # Some may have ended without a message.
            self._tasks = {task for task in self._tasks if task is not None and not task.done()}
            if len(self._tasks) >= _MOST_UNREAD:
                return False
        self._tasks.add(asyncio.current_task())
        return True

    def read(self, task: asyncio.Task[Any]) -> None:
        """The message of the task's call is there."""
        self._tasks.discard(task)
