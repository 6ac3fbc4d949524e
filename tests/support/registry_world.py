"""A registry without its network, for the tests of judging: real store, real servicers, a selector in memory.

Participants sign with keys of their own; models are tiny and distinct; nothing is random, so that two runs of the same
story give the same record log.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message

from services.registry.assignments import Assignments
from services.registry.changes import ChangeBoard
from services.registry.evaluations import Evaluations
from services.registry.faults import ValidatorFaults
from services.registry.leaderboard import Leaderboard
from services.registry.record_log import RecordLog
from services.registry.records import Artifact, ArtifactUse, Assignment, Member, Round, Submission, Task
from services.registry.referee.draws import Draws
from services.registry.referee.judging import Judging
from services.registry.referee.outages import Outages
from services.registry.referee.scans import DatasetScans
from services.registry.referee.structure import StructureChecks
from services.registry.referee.task_turns import TaskTurns
from services.registry.selection import EligibilityFacts
from services.registry.servicers.assignments import AssignmentServicer
from services.registry.servicers.evaluations import EvaluationServicer
from services.registry.servicers.submissions import SubmissionServicer
from services.registry.states import (
    ArtifactPurpose,
    Curve,
    Loss,
    MembershipState,
    Metric,
    Role,
    ScoreVisibility,
    TaskState,
)
from services.registry.store import SqlStore
from services.registry.submissions import Submissions
from services.registry.task_config import DatasetDigest, Limits, Schedule, SelectionPolicy, TaskConfig, ValidatorRate
from services.registry.transaction import Store
from services.runtime import names
from services.runtime.auth import Caller, set_caller
from services.runtime.database import Database
from services.runtime.idempotency import InFlight, RequestScope, use_memory
from services.runtime.names import AssignmentId
from services.runtime.paging import PageTokens
from tests.support.registry_fakes import START, FakeSelection, SettableClock
from tiltyard import commitments
from tiltyard.identity import Key
from tiltyard.modelspec import Linear, ModelSpec
from tiltyard.predictions import prediction_root
from tiltyard.registry.v1 import assignment_pb2, evaluation_pb2, submission_pb2
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, model_pb2
from tiltyard.type.v1 import evaluation_pb2 as type_pb2

ORIGIN = "test.arena"
TASK = "digits"
ROWS = 1000
D_EVAL = hashlib.sha256(b"D_eval").digest()
HOLDOUT = hashlib.sha256(b"holdout").digest()
# Of the predictions behind every report.
HASHES = [hashlib.sha256(bytes([block])).digest() for block in range(4)]
SPEC = ModelSpec(input_shape=(2,), outputs=2, architecture=Linear())


def key_of(name: str) -> Key:
    """The key of a participant called `name`."""
    return Key(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


CREATOR = key_of("creator")
NODES = [key_of(f"node {index}") for index in range(3)]
VALIDATORS = [key_of(f"validator {index}") for index in range(12)]
KEYS = {key.id: key for key in [CREATOR, *NODES, *VALIDATORS]}


def model_bytes(content: str, *, shapes: dict[str, list[int]] | None = None) -> bytes:
    """A safetensors file of SPEC (or of `shapes`) whose numbers follow from `content`."""
    tensors, data = {}, b""
    for name, shape in (shapes or {"head.weight": [2, 2], "head.bias": [2]}).items():
        size = 4
        for side in shape:
            size *= side
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += hashlib.shake_128(f"{content} {name}".encode()).digest(size)
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + data


class MemoryFiles:
    """Artifacts in memory."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    def open(self, sha256: str) -> "MemoryFile":
        if sha256 not in self.contents:
            raise FileNotFoundError(2, "No such file")
        return MemoryFile(self.contents[sha256])

    def local(self, sha256: str) -> AbstractContextManager[Path]:
        raise AssertionError("no dataset is scanned here")


class MemoryFile:
    """One of them."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size = len(content)

    def read(self, offset: int, length: int) -> bytes:
        return self._content[offset : offset + length]

    def close(self) -> None:
        pass


def task_config(*, k: int = 3, **changes: Any) -> TaskConfig:
    """A small task: a minute to accept, two for a lease, an hour to evaluate and again to open."""
    config = TaskConfig(
        display_name="Digits",
        description="",
        field="general",
        models=(SPEC,),
        loss=Loss.CROSS_ENTROPY,
        metric=Metric.ACCURACY,
        top_k=0,
        bound=0.0,
        evaluation_dataset=DatasetDigest(D_EVAL, 5000),
        holdout=DatasetDigest(HOLDOUT, 6000),
        schedule=Schedule(
            prepare_deadline=START + timedelta(hours=1),
            close_time=START + timedelta(days=7),
            reveal_time=timedelta(hours=1),
            accept_time=timedelta(minutes=1),
            lease_time=timedelta(minutes=2),
            evaluation_time=timedelta(hours=1),
            draw_time=timedelta(hours=24),
            holdout_time=timedelta(days=1),
        ),
        limits=Limits(
            max_parameters=1000,
            max_model_bytes=4096,
            max_cpu_time=timedelta(minutes=10),
            max_memory_bytes=1 << 30,
            daily_submissions=3,
        ),
        validators_per_submission=k,
        tolerance=0,
        selection=SelectionPolicy(Curve.POWER, 500, 100, 10, ValidatorRate(timedelta(hours=24), 100, 1000)),
        score_visibility=ScoreVisibility.FULL,
        ladder_step_micros=10_000,
        allow_node_endpoint=False,
        class_names=(),
    )
    return replace(config, **changes)


class World:
    """One registry process; `restarted` is the next one on the same state."""

    def __init__(
        self,
        database: Database,
        clock: SettableClock,
        selection: FakeSelection,
        files: MemoryFiles,
        wrap: Callable[[Store], Store] = lambda store: store,
    ) -> None:
        self.database, self.clock, self.selection, self.files = database, clock, selection, files
        self.changes = ChangeBoard()
        self.store: Store = wrap(SqlStore(database, self.changes, clock))
        self.submissions = Submissions(self.store, clock, origin=ORIGIN)
        self.assignments = Assignments(self.store, self.changes)
        self.evaluations = Evaluations(self.store)
        self.structure = StructureChecks(self.store, files, clock)
        self.draws = Draws(self.store, selection, clock)
        self.judging = Judging(self.store, clock)
        tokens = PageTokens(bytes(32))
        self.submission_servicer = SubmissionServicer(self.submissions, origin=ORIGIN, tokens=tokens)
        self.assignment_servicer = AssignmentServicer(self.assignments, tokens=tokens)
        self.faults = ValidatorFaults(self.store, selection)
        self.log = RecordLog(self.store, selection, clock, origin=ORIGIN, key=key_of("log"))
        scans = DatasetScans(files, self.changes.wake_referee)
        self.turns = TaskTurns(self.store, selection, self.log, scans, clock)
        self.outages = Outages(self.store, clock)
        self.leaderboard = Leaderboard(self.store, self.changes)
        self.evaluation_servicer = EvaluationServicer(self.evaluations, self.faults, origin=ORIGIN, tokens=tokens)
        self.steps: Sequence[Callable[[], Awaitable[int]]] = (
            self.submissions.expire_reveals,
            self.structure.check,
            self.draws.start_rounds_of_holdout,
            self.draws.draw,
            self.judging.expire_assignments,
            self.draws.call_reserves,
            self.judging.open_reports,
            self.judging.conclude,
            self.draws.find_unheard,
            self.draws.settle,
            self.faults.slash,
            self.turns.disclose,
        )
        self._scope = RequestScope(database, InFlight())

    def restarted(self, wrap: Callable[[Store], Store] = lambda store: store) -> "World":
        """What a new process finds."""
        return World(self.database, self.clock, self.selection, self.files, wrap)

    async def turn(self) -> None:
        """Run the referee's steps until none finds anything to do."""
        for _ in range(50):
            if not sum([await step() for step in self.steps]):
                return
        raise AssertionError("the referee never comes to rest")

    async def call(self, key: Key, method: Callable[[Any, Any], Awaitable[Any]], request: Message) -> Any:
        """One call of a servicer's method as `key`'s holder."""

        async def run() -> Any:
            set_caller(Caller(key.id, key.public_bytes, frozenset()))
            use_memory(self._scope)
            return await method(request, None)

        return await asyncio.create_task(run())  # type: ignore[arg-type]

    async def open_task(self, *, validators: int = 6, config: TaskConfig | None = None, task: str = TASK) -> None:
        """An OPEN task with all nodes and the first `validators` validators."""
        opened = Task(
            id=task,
            creator=CREATOR.id,
            config=config or task_config(),
            state=TaskState.OPEN,
            create_time=self.clock(),
            update_time=self.clock(),
            evaluation_rows=ROWS,
            open_time=self.clock(),
            pool_open=True,
        )
        await self.store.write(lambda tx: tx.put_task(opened))
        await self.selection.open_pool(opened)
        for node in NODES:
            await self.join(node, Role.TRAINING_NODE, task=task)
        for validator in VALIDATORS[:validators]:
            await self.join(validator, Role.VALIDATOR, task=task)

    async def join(
        self, key: Key, role: Role, *, state: MembershipState = MembershipState.ACTIVE, task: str = TASK
    ) -> None:
        """Make somebody a member, or change a member's state."""
        if state is MembershipState.ACTIVE:
            await self.selection.add_candidate(
                task=task, participant=key.id, role=role, facts=EligibilityFacts(), owner=None
            )
        member = Member(task, key.id, role, state, None, self.clock())
        await self.store.write(lambda tx: tx.put_member(member))

    async def change_task(self, **changes: Any) -> None:
        """Set fields of the task's row."""

        def change(tx: Any) -> None:
            tx.put_task(replace(tx.task(TASK), **changes))

        await self.store.write(change)

    # What a training node does.

    async def commit(self, node: Key, content: bytes, *, request_id: str = "", task: str = TASK) -> int:
        """Commit to a model; its submission's number."""
        statement = envelope_pb2.CommitStatement(
            origin=ORIGIN,
            task=names.format_task(task),
            participant=names.format_participant(node.id),
            commitment=commitments.submission_commitment(
                origin=ORIGIN,
                task=names.format_task(task),
                participant=names.format_participant(node.id),
                model_digest=hashlib.sha256(content).digest(),
                salt=_salt(content),
            ),
        )
        request = submission_pb2.CommitSubmissionRequest(
            statement=sign_statement(node, statement), request_id=request_id
        )
        answer = await self.call(node, self.submission_servicer.CommitSubmission, request)
        return names.parse_submission(answer.submission.name)[1]

    async def upload(self, node: Key, number: int, content: bytes, *, task: str = TASK) -> None:
        """Hand in the model's file."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.files.contents[sha256] = content
        use = ArtifactUse(sha256, task, ArtifactPurpose.MODEL, node.id, self.clock(), number)

        def put(tx: Any) -> None:
            tx.put_artifact(Artifact(sha256, len(content), self.clock()))
            tx.put_artifact_use(use)

        await self.store.write(put)

    async def reveal(
        self, node: Key, number: int, content: bytes, *, request_id: str = "", task: str = TASK, **changes: Any
    ) -> submission_pb2.Submission:
        """Open the commitment; `changes` are fields of the statement that are told otherwise."""
        fields = {
            "origin": ORIGIN,
            "submission": names.format_submission(task, number),
            "model_digest": hashlib.sha256(content).digest(),
            "salt": _salt(content),
            "format": model_pb2.MODEL_FORMAT_SAFETENSORS,
        }
        statement = envelope_pb2.RevealStatement(**{**fields, **changes})
        request = submission_pb2.RevealSubmissionRequest(
            statement=sign_statement(node, statement), request_id=request_id
        )
        return (await self.call(node, self.submission_servicer.RevealSubmission, request)).submission

    async def submit(self, node: Key, content: bytes, *, task: str = TASK) -> int:
        """Commit, upload and reveal."""
        number = await self.commit(node, content, task=task)
        await self.upload(node, number, content, task=task)
        await self.reveal(node, number, content, task=task)
        return number

    # What a validator does.

    async def accept(self, duty: AssignmentId, *, request_id: str = "", holder: bytes = bytes(32)) -> str:
        """Take the lease; its token."""
        request = assignment_pb2.AcceptAssignmentRequest(
            name=names.format_assignment(duty), lease_holder=holder, request_id=request_id
        )
        answer = await self.call(KEYS[duty.participant], self.assignment_servicer.AcceptAssignment, request)
        return str(answer.lease_token)

    async def decline(self, duty: AssignmentId, *, token: str = "", request_id: str = "") -> None:
        """Give the duty back."""
        request = assignment_pb2.DeclineAssignmentRequest(
            name=names.format_assignment(duty), lease_token=token, request_id=request_id
        )
        await self.call(KEYS[duty.participant], self.assignment_servicer.DeclineAssignment, request)

    async def report(self, duty: AssignmentId, finding: int | str, **changes: Any) -> envelope_pb2.EvaluationReport:
        """A validator's report: a number is the correct count, a word the fault; `changes` are other fields."""
        submission = await self.submission(duty.number)
        rows = ROWS if duty.round == 1 else ROWS // 2
        report = envelope_pb2.EvaluationReport(
            origin=ORIGIN,
            assignment=names.format_assignment(duty),
            dataset_digest=D_EVAL if duty.round == 1 else HOLDOUT,
            model_digest=submission.model_digest,
        )
        if isinstance(finding, int):
            report.counts.CopyFrom(type_pb2.Counts(correct=finding, total=rows))
            report.prediction_root = prediction_root(HASHES[: -(-rows // 256)])
            report.prediction_blocks = -(-rows // 256)
        else:
            report.fault = type_pb2.ModelFault.Value(f"MODEL_FAULT_{finding}")
        report.MergeFrom(envelope_pb2.EvaluationReport(**changes))
        return report

    async def seal(
        self, duty: AssignmentId, report: envelope_pb2.EvaluationReport, *, token: str, request_id: str = ""
    ) -> evaluation_pb2.Evaluation:
        """Seal a report."""
        key = KEYS[duty.participant]
        payload = sign_statement(key, report).payload
        name = names.format_assignment(duty)
        statement = envelope_pb2.SealStatement(
            origin=ORIGIN,
            assignment=name,
            seal=commitments.evaluation_seal(assignment=name, report=payload, salt=_salt(payload)),
        )
        request = evaluation_pb2.CommitEvaluationRequest(
            statement=sign_statement(key, statement), lease_token=token, request_id=request_id
        )
        return (await self.call(key, self.evaluation_servicer.CommitEvaluation, request)).evaluation

    async def open(
        self,
        duty: AssignmentId,
        report: envelope_pb2.EvaluationReport,
        *,
        hashes: bytes | None = None,
        request_id: str = "",
    ) -> evaluation_pb2.Evaluation:
        """Open a sealed report, with hashes of its predictions that are not the usual ones."""
        key = KEYS[duty.participant]
        envelope = sign_statement(key, report)
        request = evaluation_pb2.OpenEvaluationRequest(
            report=envelope,
            salt=_salt(envelope.payload),
            prediction_hashes=b"".join(HASHES[: report.prediction_blocks]) if hashes is None else hashes,
            request_id=request_id,
        )
        return (await self.call(key, self.evaluation_servicer.OpenEvaluation, request)).evaluation

    async def evaluate(self, duty: AssignmentId, finding: int | str, **changes: Any) -> envelope_pb2.EvaluationReport:
        """Accept and seal; the report to be opened."""
        report = await self.report(duty, finding, **changes)
        await self.seal(duty, report, token=await self.accept(duty))
        return report

    async def judge(self, number: int, *findings: int | str, round_: int = 1) -> None:
        """Let those who are assigned find `findings`, in order of position, and open them."""
        duties = await self.duties(number, "OFFERED", round_=round_)
        assert len(duties) == len(findings), duties
        reports = [await self.evaluate(duty, found) for duty, found in zip(duties, findings, strict=True)]
        await self.turn()
        for duty, report in zip(duties, reports, strict=True):
            await self.open(duty, report)
        await self.turn()

    # What is seen.

    async def task(self, task: str = TASK) -> Task:
        """The task as it is kept."""
        found = await self.store.read(lambda tx: tx.task(task))
        assert found is not None
        return found

    async def submission(self, number: int) -> Submission:
        """The submission as it is kept."""
        found = await self.store.read(lambda tx: tx.submission(TASK, number))
        assert found is not None
        return found

    async def round(self, number: int, round_: int = 1) -> Round:
        """The round as it is kept."""
        found = await self.store.read(lambda tx: tx.round(TASK, number, round_))
        assert found is not None
        return found

    async def all_duties(self, number: int, round_: int = 1) -> Sequence[Assignment]:
        """All assignments of a round by position."""
        return await self.store.read(lambda tx: tx.assignments(TASK, number, round_))

    async def duties(self, number: int, *states: str, round_: int = 1) -> list[AssignmentId]:
        """Those in one of the states (all by default) by position."""
        return [
            AssignmentId(a.task, a.number, a.round, a.validator)
            for a in await self.all_duties(number, round_)
            if not states or a.state.name in states
        ]

    async def states(self, number: int, round_: int = 1) -> list[str]:
        """The states of a round's assignments by position."""
        return [a.state.name for a in await self.all_duties(number, round_)]

    async def leaf_kinds(self) -> list[str]:
        """Which entry each leaf of the record log holds, in order."""
        from tiltyard.type.v1 import log_pb2

        leaves = await self.store.read(lambda tx: tx.leaves(start=0, limit=10_000))
        return [str(log_pb2.LogEntry.FromString(leaf.entry).WhichOneof("entry")) for leaf in leaves]


def _salt(content: bytes) -> bytes:
    return hashlib.sha256(b"salt" + content).digest()


def open_database(folder: Path, clock: SettableClock) -> Database:
    """The registry's database in a folder."""
    return Database.open(f"sqlite:///{folder}/registry.db", migrations="services.registry.migrations", clock=clock)
