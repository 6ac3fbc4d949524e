"""How a server that stops brings its calls to their ends."""

import asyncio
from typing import Any, Protocol

from services.runtime.errors import Unavailable


class Drained(Protocol):
    """What a method is to a drain."""

    @property
    def watch(self) -> bool:
        """Whether it lasts as long as its caller likes."""

    @property
    def about_server(self) -> bool:
        """Health and reflection: who makes other calls asks them, too."""


class Conversations:
    """Calls that wait for a message which need not come: a drain ends them. What has been asked is answered first."""

    def __init__(self) -> None:
        self.over = False
        self._waiting: set[asyncio.Timeout] = set()

    def end(self) -> None:
        """No further message is waited for, now and from now on."""
        self.over = True
        for patience in self._waiting:
            if not patience.expired():
                patience.reschedule(0)

    def wait(self, patience: asyncio.Timeout) -> None:
        """One waits for its client's next message, as long as `patience` lasts."""
        self._waiting.add(patience)
        if self.over:
            patience.reschedule(0)

    def go_on(self, patience: asyncio.Timeout) -> None:
        """It waits no more."""
        self._waiting.discard(patience)


class Drain:
    """Ends the streams that would never end by themselves as the server drains, with UNAVAILABLE.

    These are watches (`Watch...`), two-way streams that are silent, and reflection.
    Their callers then watch another server, or this one after its restart; every other call is left to finish. The
    watches of health end last, since they are how a client learns of the drain, and reflection with them, by which a
    tool reads the answers of calls that are still to come.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._watching: set[asyncio.Task[Any]] = set()
        self._watching_server: set[asyncio.Task[Any]] = set()
        self._draining = False
        self.conversations = Conversations()
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, method: Drained) -> asyncio.Task[Any]:
        """The beginning of a call: from here on `drain` waits for it, or ends it when it is a watch."""
        if method.watch and self._draining:
            raise draining()
        task = asyncio.current_task()
        assert task is not None  # a call is a task
        self._group(method).add(task)
        self._note_idle()
        return task

    def end(self, method: Drained, task: asyncio.Task[Any]) -> None:
        """The end of a call that has begun."""
        self._group(method).discard(task)
        self._note_idle()

    def ends(self, method: Drained, context: Any) -> bool:
        """Whether a call that was cancelled was so by `drain`, and not by its caller."""
        return method.watch and self._draining and not context.cancelled()

    def _group(self, method: Drained) -> set[asyncio.Task[Any]]:
        if method.about_server:
            return self._watching_server
        return self._watching if method.watch else self._running

    def _note_idle(self) -> None:
        if self._running or self._watching:
            self._idle.clear()
        else:
            self._idle.set()

    async def drain(self) -> None:
        """Ends the watches, now and from now on, and those of the server itself when no other call is left."""
        self._draining = True
        for task in list(self._watching):
            task.cancel()
        self.conversations.end()
        await self._idle.wait()
        for task in list(self._watching_server):
            task.cancel()


def draining() -> Unavailable:
    """What a call is answered that the drain ends."""
    return Unavailable("SERVER_DRAINING", "this server is stopping, call again")
