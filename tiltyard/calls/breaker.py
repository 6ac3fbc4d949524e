"""Fails calls to a dead peer at once, and lets one through now and then to see whether it is back."""

import time
from collections.abc import Callable

import grpc

FAILURES = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0


class CircuitBreaker:
    """Counts the calls in a row that a peer left unanswered; from `failures` on, refuses most of the next.

    While it refuses, one call goes through after each pause, which doubles up to `LONGEST_PAUSE_S`: its answer, be it
    an error, lets all through again. Who is refused has waited for nothing, where a peer that hangs costs each caller
    its whole deadline. `clock` gives seconds and never goes back.
    """

    def __init__(self, address: str, *, failures: int = FAILURES, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._failures = failures
        self._clock = clock
        self._in_a_row = 0
        self._pause_s = FIRST_PAUSE_S
        self._next_probe = 0.0

    def admit(self) -> None:
        """Before a call. Raises grpc.aio.AioRpcError with UNAVAILABLE, without calling, while the peer is dead."""
        if self._in_a_row < self._failures:
            return
        wait_s = self._next_probe - self._clock()
        if wait_s > 0:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE,
                initial_metadata=grpc.aio.Metadata(),
                trailing_metadata=grpc.aio.Metadata(),
                details=f"{self._address} left {self._in_a_row} calls in a row unanswered; next try in {wait_s:.1f} s",
            )
        # This call is the probe. Should it hang, the next goes after another pause.
        self._next_probe = self._clock() + self._pause_s

    def answered(self) -> None:
        """The peer has answered a call, with a result or an error of its own."""
        self._in_a_row = 0
        self._pause_s = FIRST_PAUSE_S

    def unanswered(self) -> None:
        """The peer could not be reached, or let a call run into its deadline."""
        self._in_a_row += 1
        if self._in_a_row >= self._failures:
            self._next_probe = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
