"""An arena of every service, and a valid request to each of its methods."""

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

import tiltyard
from services.validator.signing import KeyNotary
from tests.support.registry_server import artifact_name, config_of, join_request
from tests.support.whole_arena import ORIGIN, TASKS, WholeArena
from tiltyard.commitments import submission_commitment
from tiltyard.identity import TokenSource
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, model_pb2, participation_pb2, task_pb2

STREAM_S = 0.05

# What ends a task or a membership comes when the rest has been tried.
ENDING = {"CloseTask", "CancelTask", "PublishHoldout", "LeaveTask", "ClosePool", "RemoveCandidate"}


def methods() -> dict[str, MethodDescriptor]:
    """Every method of the contract by its path."""
    root = Path(next(iter(tiltyard.__path__)))
    found = {}
    for path in sorted(root.rglob("*_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                found[f"/{service.full_name}/{method.name}"] = method
    return found


class Asked:
    """Every method of an arena's services, and a valid request for each: server, caller and message."""

    def __init__(self, arena: WholeArena) -> None:
        self.arena = arena
        self.methods = methods()
        self.seeds = {path: self._seed(method) for path, method in self.methods.items()}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tokens: dict[tuple[str, str], TokenSource] = {}

    def names(self) -> list[str]:
        """Texts that name something there."""
        people = [f"participants/{key.id}" for key in self.arena.keys.values()]
        tasks = [f"tasks/{task}" for task in TASKS]
        submission = "tasks/running/submissions/1"
        artifact = artifact_name(self.arena.dataset)
        assignment = self.arena.assignment
        return [
            *people,
            *(name.partition("/")[2] for name in people),
            *tasks,
            *TASKS,
            *(f"{tasks[0]}/members/{name.partition('/')[2]}" for name in people),
            *(f"stakes/{name.partition('/')[2]}" for name in people),
            *(submission, assignment, assignment.replace("assignments", "evaluations"), artifact),
            *("draws/none", "trainings/none", "tasks/running/submissions/2", "d.safetensors"),
        ]

    def _seed(self, method: MethodDescriptor) -> tuple[str, str, Message]:
        """A server, a caller, and a request that this caller may make of it."""
        arena, service = self.arena, method.containing_service.full_name
        server = {
            "tiltyard.selector.v1": "selector",
            "tiltyard.trainer.v1": "trainer",
            "tiltyard.validator.v1": "validator",
            "inference": "trainer",
        }.get(service.rpartition(".")[0], "registry")
        caller = "operator" if server in ("trainer", "validator") else "node"
        keys = arena.keys
        names = {name: f"participants/{key.id}" for name, key in keys.items()}
        running, submission = "tasks/running", "tasks/running/submissions/1"
        judge = arena.assignment.rpartition("-")[2]
        validator = next(name for name, key in keys.items() if key.id == judge)
        policy = {"validator_min_stake_micros": 100, "training_node_min_stake_micros": 10}

        def statement(name: str, kind: type[Message], **fields: Any) -> envelope_pb2.Envelope:
            return sign_statement(keys[name], kind(origin=ORIGIN, **fields))

        salt = bytes(32)
        joining = join_request(keys["stranger"], participation_pb2.ROLE_VALIDATOR, task="running", origin=ORIGIN)
        judged = {"dataset_digest": salt, "model_digest": salt, "fault": evaluation_pb2.MODEL_FAULT_CRASHED}
        report = statement(validator, envelope_pb2.EvaluationReport, assignment=arena.assignment, **judged)
        seal = envelope_pb2.Envelope.FromString(
            KeyNotary(keys[validator], ORIGIN).seal(arena.assignment, report.SerializeToString(), salt)
        )
        commitment = submission_commitment(
            origin=ORIGIN, task=running, participant=names["node"], model_digest=salt, salt=salt
        )
        commit = statement(
            "node", envelope_pb2.CommitStatement, task=running, participant=names["node"], commitment=commitment
        )
        safetensors = model_pb2.MODEL_FORMAT_SAFETENSORS
        shown = {"submission": submission, "model_digest": salt, "salt": salt, "format": safetensors}
        reveal = statement("node", envelope_pb2.RevealStatement, **shown)
        endorsed = {"endorser": names["creator"], "subject": names["node"], "field": "images"}
        word = statement("creator", envelope_pb2.EndorsementStatement, **endorsed)
        taken = statement("creator", envelope_pb2.EndorsementStatement, **endorsed, revoke=True)
        owner = statement("creator", envelope_pb2.OwnerStatement, owner=names["creator"], participant=names["node"])
        artifact = artifact_name(arena.dataset)
        config = config_of(arena.dataset)
        table: dict[str, tuple[str, dict[str, Any]]] = {
            "UploadArtifact": (
                "creator",
                {"header": {"artifact": artifact, "size_bytes": len(arena.dataset), "task": "tasks/preparing"}},
            ),
            "GetUpload": ("creator", {"artifact": artifact}),
            "DownloadArtifact": ("creator", {"name": artifact, "offset": 3}),
            "GetArtifact": ("creator", {"name": artifact}),
            "ListAssignments": (validator, {"parent": submission, "page_size": 5}),
            "WatchAssignments": (validator, {}),
            "AcceptAssignment": (validator, {"name": arena.assignment, "lease_holder": salt, "request_id": "a"}),
            "RenewAssignment": (validator, {"name": arena.assignment, "lease_token": "t"}),
            "DeclineAssignment": ("one", {"name": arena.assignment, "reason": "busy"}),
            "CommitEvaluation": (validator, {"statement": seal, "lease_token": "t"}),
            "OpenEvaluation": (validator, {"report": report, "salt": salt}),
            "GetEvaluation": ("node", {"name": arena.assignment.replace("assignments", "evaluations")}),
            "ListEvaluations": ("node", {"parent": submission}),
            "ListValidatorFaults": ("node", {"parent": running}),
            "GetLeaderboard": ("node", {"task": running}),
            "WatchLeaderboard": ("node", {"task": running}),
            "ListEntries": ("node", {"start_index": 1, "page_size": 3}),
            "GetInclusionProof": ("node", {"index": 1, "tree_size": 5}),
            "GetConsistencyProof": ("node", {"old_size": 1, "new_size": 5}),
            "JoinTask": ("stranger", {"statement": joining.statement}),
            "PauseMembership": ("three", {"name": f"{running}/members/{keys['three'].id}"}),
            "ResumeMembership": ("three", {"name": f"{running}/members/{keys['three'].id}"}),
            "LeaveTask": ("three", {"name": f"tasks/spare-1/members/{keys['three'].id}"}),
            "ListMembers": ("node", {"parent": running, "page_size": 2}),
            "ListEligibilityVerdicts": ("node", {"parent": running}),
            "RegisterParticipant": ("stranger", {"display_name": "Strange", "request_id": "r"}),
            "GetParticipant": ("node", {"name": names["creator"]}),
            "ListParticipants": ("node", {"page_size": 2}),
            "BindOwner": ("node", {"statement": owner}),
            "EndorseParticipant": ("creator", {"statement": word}),
            "RevokeEndorsement": ("creator", {"statement": taken}),
            "CommitSubmission": ("node", {"statement": commit}),
            "RevealSubmission": ("node", {"statement": reveal}),
            "GetSubmission": ("node", {"name": submission}),
            "ListSubmissions": ("node", {"parent": running, "filter": "state = EVALUATING"}),
            "CreateTask": ("creator", {"task_id": "another", "config": config}),
            "GetTask": ("node", {"name": running}),
            "ListTasks": ("node", {"filter": "state = OPEN", "page_size": 2}),
            "UpdateTask": (
                "creator",
                {
                    "task": {"name": "tasks/spare-1", "config": config},
                    "update_mask": {"paths": ["config.display_name"]},
                },
            ),
            "WatchTask": ("node", {"name": running}),
            "CloseTask": ("creator", {"name": "tasks/spare-1"}),
            "CancelTask": ("creator", {"name": "tasks/spare-2", "reason": "why not"}),
            "PublishHoldout": ("creator", {"name": "tasks/spare-2"}),
            "DrawValidators": (
                "registry",
                {"submission": "tasks/x/submissions/1", "round": 1, "anchor": salt, "reveal_salt": salt}
                | {"validators": 1, "submitter": names["node"]},
            ),
            "ExtendDraw": ("registry", {"draw": "draws/x-1-1", "picks": 2}),
            "GetDraw": ("node", {"name": "draws/x-1-1"}),
            "SettleAssignment": ("registry", {"draw": "draws/x-1-1", "participant": names["one"], "settlement": 1}),
            "EstimateOdds": ("node", {"task": running, "validators": 2, "participant": names["one"]}),
            "ModelMetadata": ("operator", {"name": "none"}),
            "RepositoryModelLoad": ("operator", {"model_name": "none"}),
            "RepositoryModelUnload": ("operator", {"model_name": "none"}),
            "CheckEligibility": (
                "registry",
                {"participant": names["one"], "task": "tasks/x", "role": 3, "facts": {}, "policy": policy},
            ),
            "OpenPool": (
                "registry",
                {
                    "task": "tasks/x",
                    "policy": policy,
                    "creator": names["creator"],
                    "open_time": {"seconds": 1767225600},
                },
            ),
            "AddCandidate": ("registry", {"task": "tasks/x", "participant": names["one"], "role": 3, "facts": {}}),
            "RemoveCandidate": ("registry", {"task": "tasks/x", "participant": names["one"]}),
            "ClosePool": ("registry", {"task": "tasks/x"}),
            "MergeOwnerGroups": ("registry", {"participant": names["one"], "owner": names["creator"]}),
            "Deposit": (
                "operator",
                {"participant": names["one"], "amount_micros": 500, "reference": "more", "funding_account": "b"},
            ),
            "RequestWithdrawal": ("creator", {"amount_micros": 10}),
            "Withdraw": ("creator", {}),
            "Slash": ("registry", {"participant": names["one"], "fault": 1, "evidence": arena.assignment}),
            "GetStake": ("node", {"name": f"stakes/{keys['one'].id}"}),
            "ListStakes": ("node", {"page_size": 2}),
            "ListLedgerEvents": ("node", {"start_sequence": 1, "page_size": 2}),
            "StartTraining": (
                "operator",
                {"dataset": "d.safetensors", "model": config.models[0], "loss": task_pb2.LOSS_CROSS_ENTROPY},
            ),
            "GetTraining": ("operator", {"name": "trainings/none"}),
            "WatchTraining": ("operator", {"name": "trainings/none"}),
            "CancelTraining": ("operator", {"name": "trainings/none"}),
            "WatchEvaluationRun": ("operator", {"assignment": arena.assignment}),
            "ModelInfer": ("operator", _infer()),
            "ModelStreamInfer": ("operator", _infer()),
        }
        who, fields = table.get(method.name, (caller, {}))
        # The registry's own words to the selector go to one that no registry watches: its pools are nobody's tasks.
        if server == "selector" and who == "registry":
            server = "selector-2"
        return server, who, message_factory.GetMessageClass(method.input_type)(**fields)

    async def send(self, path: str, server: str, who: str, requests: list[bytes]) -> str:
        """Calls with these bytes; the code's name, or OPEN for a stream that goes on."""
        endpoint = self.arena.endpoints[server]
        if server not in self._channels:
            self._channels[server] = grpc.aio.insecure_channel(endpoint.address)
        source = self._tokens.setdefault((server, who), TokenSource(self.arena.keys[who], endpoint.audience))
        method, channel = self.methods[path], self._channels[server]
        shape = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        call = getattr(channel, shape)(path)
        options: dict[str, Any] = {"metadata": (("authorization", f"Bearer {source.token()}"),), "timeout": 30}
        running = call(_each(requests), **options) if method.client_streaming else call(requests[0], **options)
        if not method.server_streaming:
            return _told(await running.code(), await running.details())
        try:
            async with asyncio.timeout(STREAM_S):
                async for _ in running:
                    pass
        except TimeoutError:
            running.cancel()
            return "OPEN"
        except grpc.aio.AioRpcError as error:
            return _told(error.code(), error.details())
        return "OK"

    async def send_valid(self) -> dict[str, str]:
        """Sends the valid requests, but for those that end something; the codes by method."""
        # Pools are there before anybody is drawn from them, and participants before they join.
        early = ("OpenPool", "AddCandidate", "RegisterParticipant")
        codes = {}
        for path in sorted(self.methods, key=lambda path: not path.endswith(early)):
            server, who, valid = self.seeds[path]
            if path.rpartition("/")[2] not in ENDING:
                codes[path] = await self.send(path, server, who, [valid.SerializeToString()])
        return codes

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


def _told(code: grpc.StatusCode, details: str | None) -> str:
    # What grpc.aio says of a call that the server ended while it was written to; the server's own log has the code.
    lost = code is grpc.StatusCode.INTERNAL and "Internal error from Core" in (details or "")
    return "OPEN" if lost else code.name


def _infer() -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    return {"model_name": "none", "id": "1", "inputs": [tensor], "raw_input_contents": [bytes(16)]}


async def _each(requests: list[bytes]) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


@contextlib.asynccontextmanager
async def arena_in(folder: Path) -> AsyncIterator[WholeArena]:
    arena = WholeArena(folder)
    try:
        await arena.start()
        yield arena
    finally:
        await arena.stop()
