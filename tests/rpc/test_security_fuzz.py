"""Random mutations of valid requests to every method of every service: no defect shows, and no state without a leaf."""

import asyncio
import collections
import contextlib
import importlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from structlog.testing import capture_logs

import tiltyard
from services.validator.signing import KeyNotary
from tests.support.mutations import Mutator
from tests.support.registry_server import artifact_name, config_of, join_request
from tests.support.state_of_logs import registry_differences, selector_differences
from tests.support.whole_arena import ORIGIN, TASKS, WholeArena
from tiltyard.audit import audit
from tiltyard.audit.download import fetch_record
from tiltyard.calls.channel import open_channel
from tiltyard.commitments import submission_commitment
from tiltyard.identity import TokenSource
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2, model_pb2, participation_pb2, task_pb2
from tiltyard.type.v1 import stake_pb2 as types_pb2

QUICK = 2000
SOAK = int(os.environ.get("TILTYARD_FUZZ_MUTATIONS", "100000"))
AT_ONCE = 16
STREAM_S = 0.05

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


class Fuzzed:
    """The arena, a valid request for each method, and what was answered."""

    def __init__(self, arena: WholeArena, seed: int) -> None:
        self.arena = arena
        self.methods = methods()
        self.answers: collections.Counter[tuple[str, str]] = collections.Counter()
        self.seeds = {path: self._seed(method) for path, method in self.methods.items()}
        self.mutator = Mutator(seed, self._names())
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._tokens: dict[tuple[str, str], TokenSource] = {}

    def _names(self) -> list[str]:
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

    async def mutate(self, paths: list[str], number: int) -> None:
        """`number` mutants of these methods, several at once."""

        async def one() -> None:
            path = self.mutator.random.choice(paths)
            server, who, valid = self.seeds[path]
            if self.mutator.random.random() < 0.1:
                who = self.mutator.random.choice(list(self.arena.keys))
            if server == "selector" and self.mutator.random.random() < 0.5:
                server = "selector-2"
            key = self.arena.keys[who]
            requests = [self.mutator.mutant(valid, key)]
            while self.methods[path].client_streaming and self.mutator.random.random() < 0.6:
                requests.append(self.mutator.mutant(valid, key))
            code = await self.send(path, server, who, requests)
            self.answers[path, code] += 1

        left = number

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await one()

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

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


async def fuzz(folder: Path, number: int, seed: int) -> None:
    """Sends mutants of `seed`. They are the same each time; in which order they arrive is not."""
    with capture_logs() as logs:
        async with arena_in(folder) as arena:
            fuzzed = Fuzzed(arena, seed)
            # Pools are there before anybody is drawn from them, and participants before they join.
            early = ("OpenPool", "AddCandidate", "RegisterParticipant")
            for path in sorted(fuzzed.methods, key=lambda path: not path.endswith(early)):
                server, who, valid = fuzzed.seeds[path]
                if path.rpartition("/")[2] not in ENDING:
                    fuzzed.answers[path, await fuzzed.send(path, server, who, [valid.SerializeToString()])] += 1
            accepted = {path for path, code in fuzzed.answers if code in ("OK", "OPEN")}
            ending = [path for path in fuzzed.methods if path.rpartition("/")[2] in ENDING]
            await fuzzed.mutate([path for path in fuzzed.methods if path not in ending], number * 9 // 10)
            await fuzzed.mutate(ending, number - number * 9 // 10)
            await fuzzed.close()
            await arena.settle()
            record = await fetch_record(arena.client("node"))
            checked = audit(record, log_key=arena.registry.log_key)
            databases = arena.databases()
            differences = registry_differences(record, databases["registry"])
            for name in ("selector", "selector-2"):
                differences += selector_differences(await ledger_of(arena, name), databases[name])
    defects = [entry for entry in logs if entry["log_level"] == "error" or entry.get("code") in ("INTERNAL", "UNKNOWN")]
    assert not defects, (seed, defects[:3])
    wrong = {answer: count for answer, count in fuzzed.answers.items() if answer[1] not in ANSWERS}
    assert not wrong, (seed, wrong)
    assert not checked.failures, (seed, checked.failures[:5])
    assert not differences, (seed, differences[:5])
    # The mutants reach what valid requests reach: most methods take their seed, and all were asked.
    assert len(accepted) > len(fuzzed.methods) / 2, sorted(set(fuzzed.methods) - accepted)
    asked = {path for path, _ in fuzzed.answers}
    assert asked == set(fuzzed.methods)


async def test_two_thousand_mutations_of_valid_requests_find_no_defect(tmp_path: Path) -> None:
    await fuzz(tmp_path, QUICK, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_a_hundred_thousand_mutations_of_valid_requests_find_no_defect(tmp_path: Path) -> None:
    await fuzz(tmp_path, SOAK, seed=int.from_bytes(os.urandom(4), "big"))
