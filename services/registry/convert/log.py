"""The record log in the contract's words."""

from collections.abc import Sequence

from services.registry.convert.times import timestamp
from services.registry.record_log import SignedCheckpoint
from services.registry.transaction import Leaf
from services.runtime.fields import FieldChecks
from services.runtime.paging import page_size
from tiltyard.registry.v1 import log_pb2


def entries_of(request: log_pb2.ListEntriesRequest) -> tuple[int, int]:
    """The first index and how many leaves are wanted."""
    _check_not_negative(start_index=request.start_index)
    return request.start_index, page_size(request.page_size, default=100)


def inclusion_of(request: log_pb2.GetInclusionProofRequest) -> tuple[int, int]:
    """The leaf's index and the tree's size."""
    _check_not_negative(index=request.index, tree_size=request.tree_size)
    return request.index, request.tree_size


def consistency_of(request: log_pb2.GetConsistencyProofRequest) -> tuple[int, int]:
    """The sizes of the older and the newer tree."""
    _check_not_negative(old_size=request.old_size, new_size=request.new_size)
    return request.old_size, request.new_size


def checkpoint_message(signed: SignedCheckpoint) -> log_pb2.Checkpoint:
    """A checkpoint with its note."""
    return log_pb2.Checkpoint(
        origin=signed.checkpoint.origin,
        size=signed.checkpoint.size,
        root_hash=signed.checkpoint.root,
        note=signed.note,
        sign_time=timestamp(signed.sign_time),
    )


def entries_message(start: int, leaves: Sequence[Leaf]) -> log_pb2.ListEntriesResponse:
    """One page of ListEntries."""
    return log_pb2.ListEntriesResponse(
        leaves=[log_pb2.Leaf(index=leaf.index, entry=leaf.entry) for leaf in leaves],
        next_index=start + len(leaves),
    )


def _check_not_negative(**values: int) -> None:
    checks = FieldChecks()
    for field, value in values.items():
        checks.require(field, value >= 0, f"is {value}, must not be negative")
    checks.finish()
