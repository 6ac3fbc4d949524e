"""LogService over the domain's record log."""

from typing import Any

from services.registry.convert import log as convert
from services.registry.record_log import RecordLog
from tiltyard.registry.v1 import log_pb2, log_pb2_grpc


class LogServicer(log_pb2_grpc.LogServiceServicer):
    """The record log."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log

    async def GetCheckpoint(self, request: log_pb2.GetCheckpointRequest, context: Any) -> log_pb2.GetCheckpointResponse:
        return log_pb2.GetCheckpointResponse(checkpoint=convert.checkpoint_message(await self._log.checkpoint()))

    async def ListEntries(self, request: log_pb2.ListEntriesRequest, context: Any) -> log_pb2.ListEntriesResponse:
        start, limit = convert.entries_of(request)
        return convert.entries_message(start, await self._log.entries(start=start, limit=limit))

    async def GetInclusionProof(
        self, request: log_pb2.GetInclusionProofRequest, context: Any
    ) -> log_pb2.GetInclusionProofResponse:
        index, size = convert.inclusion_of(request)
        proof = await self._log.prove_inclusion(index=index, tree_size=size)
        return log_pb2.GetInclusionProofResponse(leaf_hash=proof.leaf_hash, tree_size=proof.tree_size, path=proof.path)

    async def GetConsistencyProof(
        self, request: log_pb2.GetConsistencyProofRequest, context: Any
    ) -> log_pb2.GetConsistencyProofResponse:
        old_size, new_size = convert.consistency_of(request)
        proof = await self._log.prove_consistency(old_size=old_size, new_size=new_size)
        return log_pb2.GetConsistencyProofResponse(path=proof.path, new_size=proof.new_size)
