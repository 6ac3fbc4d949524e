"""An evaluation by servers that this process did not start: channels to them, and what they answer, counted."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import grpc
import numpy as np
import structlog
from numpy.typing import NDArray

from services.validator.assignments import Order
from services.validator.batches import rows_per_batch
from services.validator.children import stall_s, while_it_moves
from services.validator.evaluation import CannotEvaluate, ModelFailed, ServerLost
from services.validator.fleet import ANSWER_TIMEOUT_S, Endpoint, Fleet
from services.validator.pipeline import CHANNEL_OPTIONS, RequestRefused, StreamBroken, WrongAnswer
from services.validator.rows import EvaluationRows
from services.validator.runs import Fault, Finding, Progress
from tiltyard.calls.observed import observed_channel
from tiltyard.counting import Metric, NanOutput, Tally
from tiltyard.identity import Key, TokenSource

# Who takes nothing of what was sent for so long is hung up on: a channel to such a peer would never close, and its
# thread, socket and batches stay for good. It pings no more often than servers commonly allow.
_HANG_UP = (("grpc.keepalive_time_ms", 310_000), ("grpc.keepalive_timeout_ms", int(ANSWER_TIMEOUT_S * 1000)))

_log = structlog.get_logger("tiltyard.validator")


@contextmanager
def connected(
    name: str,
    target: str,
    *,
    key: Key,
    audience: str,
    credentials: grpc.ChannelCredentials | None,
    peer: str = "",
    options: Sequence[tuple[str, str | int]] = (),
) -> Iterator[Endpoint]:
    """A channel to the server at `target`, whose calls carry a token of `key` for `audience` ("": none).

    `peer` is its address as telemetry tells it, empty for strangers', of which there are many.
    """
    tokens = TokenSource(key, audience)

    def metadata() -> tuple[tuple[str, str | bytes], ...]:
        return (("authorization", f"Bearer {tokens.token()}"),) if audience else ()

    all_options = (*CHANNEL_OPTIONS, *_HANG_UP, *options)
    channel = (
        grpc.insecure_channel(target, options=all_options)
        if credentials is None
        else grpc.secure_channel(target, credentials, options=all_options)
    )
    try:
        yield Endpoint(name, observed_channel(channel, peer=peer), metadata)
    finally:
        # A channel closes only when what was handed to its socket has been read, or the peer is hung up on: nobody
        # waits for a server that hangs, and least of all the event loop.
        threading.Thread(target=channel.close, name=f"closing-{name}", daemon=True).start()


async def count(
    endpoints: Sequence[Endpoint],
    *,
    model: str,
    rows: EvaluationRows,
    order: Order,
    progress: Progress,
    threads: Executor,
) -> Finding:
    """What the servers answer to every row, counted.

    What they do wrong is never the model's fault, since nobody here confines them; an output that is NaN is. Raises
    ModelFailed, ServerLost and CannotEvaluate.
    """
    tally = Tally(order.metric or Metric.ACCURACY, top_k=order.top_k, bound=order.bound)
    fleet = Fleet(
        endpoints,
        model=model,
        outputs=order.spec.outputs,
        rows_per_batch=rows_per_batch(order.spec, rows.row_bytes),
    )

    def take(start: int, stop: int, logits: NDArray[np.float32]) -> None:
        try:
            tally.add(logits, rows.labels(start, stop))
        except ValueError as error:
            raise CannotEvaluate(f"rows {start} to {stop} of the dataset: {error}") from error
        progress.advance(stop)

    running = asyncio.get_running_loop().run_in_executor(threads, fleet.run, rows, take)
    try:
        await while_it_moves(running, progress, stall_s(order))
    except NanOutput as error:
        raise ModelFailed(Fault.NAN_OUTPUT, str(error)) from error
    except (WrongAnswer, RequestRefused) as error:
        raise CannotEvaluate(f"a model server does not answer as it should: {error}") from error
    except (StreamBroken, TimeoutError) as error:
        raise ServerLost(f"no model server is left: {error}") from error
    finally:
        fleet.cancel()
        # The thread reads the file until it ends.
        with contextlib.suppress(Exception):
            await asyncio.shield(running)
        for server, detail in fleet.troubles().items():
            _log.warning("a model server failed or was late", server=server, detail=detail)
    return Finding(counts=tally.counts(), prediction_blocks=tally.prediction_blocks())
