"""Downloads a record log from its registry, up to the present checkpoint."""

from tiltyard.audit.record import InvalidRecord, Record
from tiltyard.client import Client, persist
from tiltyard.registry.v1 import log_pb2
from tiltyard.transfers import Progress

_PAGE = 1000


async def fetch_leaves(client: Client, *, start: int, end: int, progress: Progress | None = None) -> list[bytes]:
    """Leaves from `start` until before `end`. Raises InvalidRecord when the registry has fewer."""
    leaves: list[bytes] = []
    while start + len(leaves) < end:
        at = start + len(leaves)
        request = log_pb2.ListEntriesRequest(start_index=at, page_size=min(_PAGE, end - at))
        page = (await persist(lambda request=request: client.log.ListEntries(request))).leaves  # type: ignore[misc]
        if [leaf.index for leaf in page] != list(range(at, at + len(page))) or not page:
            raise InvalidRecord(f"the registry signed {end} leaves and does not show leaf {at}")
        leaves += [leaf.entry for leaf in page]
        if progress:
            progress(start + len(leaves), end)
    return leaves


async def fetch_record(client: Client, *, progress: Progress | None = None) -> Record:
    """The whole log. Raises InvalidRecord, ClientError, grpc.aio.AioRpcError."""
    checkpoint = (await persist(lambda: client.log.GetCheckpoint(log_pb2.GetCheckpointRequest()))).checkpoint
    return Record(checkpoint.note, tuple(await fetch_leaves(client, start=0, end=checkpoint.size, progress=progress)))
