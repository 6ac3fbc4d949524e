"""A small record log by hand: one submission, judged by three of four validators, with all that leads to it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tiltyard.audit import Record
from tiltyard.bls import BlsKey
from tiltyard.commitments import draw_seed, evaluation_seal, submission_commitment
from tiltyard.curves import SQUARE_ROOT, weight
from tiltyard.identity import Key
from tiltyard.receipts import sign_receipts
from tiltyard.registry.v1 import leaderboard_pb2
from tiltyard.scoring import wilson_interval
from tiltyard.sortition import SumTree, draw, draw_id, drawn_member
from tiltyard.statements import sign_statement
from tiltyard.transparency import Checkpoint, checkpoint_body, leaf_hash, root_hash, sign_note
from tiltyard.type.v1 import (
    draw_pb2,
    envelope_pb2,
    evaluation_pb2,
    participation_pb2,
    stake_pb2,
    task_pb2,
)
from tiltyard.type.v1 import log_pb2 as log_type_pb2

ORIGIN = "tiltyard.test"
TASK = "tasks/t"
SUBMISSION = f"{TASK}/submissions/1"
MODEL = hashlib.sha256(b"model").digest()
DATASET = hashlib.sha256(b"dataset").digest()
SALT = bytes(range(32))
STAKE = 1_000_000
Entry = log_type_pb2.LogEntry


@dataclass
class ToldLog:
    """A log in the making; three validators count `counted` of 10, and the score says `score`."""

    log_key: Key = field(default_factory=Key.generate)
    selector: BlsKey = field(default_factory=lambda: BlsKey(bytes(32)))
    creator: Key = field(default_factory=Key.generate)
    node: Key = field(default_factory=Key.generate)
    validators: list[Key] = field(default_factory=lambda: [Key.generate() for _ in range(4)])
    counted: tuple[int, ...] = (8, 7, 8)
    score: int = 8
    leaves: list[bytes] = field(default_factory=list)
    events: int = 0
    draw_time_s: int = 0
    tree: SumTree = field(default_factory=SumTree)

    def write(self, entry: log_type_pb2.LogEntry) -> None:
        """One more leaf, a second after the last."""
        entry.time.FromSeconds(10_000 + len(self.leaves))
        self.leaves.append(entry.SerializeToString(deterministic=True))

    def event(self, **fields: object) -> None:
        """One more ledger event."""
        self.events += 1
        event = stake_pb2.LedgerEvent(sequence=self.events, **fields)  # type: ignore[arg-type]
        event.time.FromSeconds(1_000 + self.events)
        self.write(Entry(ledger_event=event))

    def tell(self) -> "ToldLog":
        """The whole of it."""
        self.begin()
        self.commit_and_reveal()
        self.evaluate(self.draw())
        return self

    def begin(self) -> None:
        """Until everybody has joined."""
        self.write(
            Entry(
                genesis=log_type_pb2.Genesis(
                    origin=ORIGIN, log_key=self.log_key.public_bytes, selector_key=self.selector.public_key
                )
            )
        )
        for key in (self.creator, self.node, *self.validators):
            registered = log_type_pb2.ParticipantRegistered(
                participant=named(key), public_key=key.public_bytes, display_name=f"name of {key.id[:4]}"
            )
            self.write(Entry(participant_registered=registered))
            self.event(
                kind=stake_pb2.LEDGER_EVENT_KIND_DEPOSITED,
                participant=named(key),
                amount_micros=self.stake_of(key),
                owner_group=key.id,
            )
        config = task_pb2.TaskConfig(
            evaluation_dataset=task_pb2.DatasetDigest(sha256=DATASET, size_bytes=7),
            validators_per_submission=3,
            tolerance=1,
            selection=task_pb2.SelectionPolicy(
                curve=task_pb2.CURVE_POWER,
                alpha_millis=500,
                validator_min_stake_micros=STAKE,
                training_node_min_stake_micros=STAKE,
            ),
        )
        self.verdict(self.creator, participation_pb2.ROLE_TASK_CREATOR)
        self.write(Entry(task_created=log_type_pb2.TaskCreated(task=TASK, creator=named(self.creator), config=config)))
        self.event(kind=stake_pb2.LEDGER_EVENT_KIND_POOL_OPENED, participant=named(self.creator), task=TASK)
        self.write(Entry(task_changed=log_type_pb2.TaskChanged(task=TASK, state=task_pb2.TASK_STATE_OPEN)))
        self.join(self.node, participation_pb2.ROLE_TRAINING_NODE)
        for key in self.validators:
            self.join(key, participation_pb2.ROLE_VALIDATOR)

    def stake_of(self, key: Key) -> int:
        """Validators have one, two, three and four times the minimum; the others the minimum."""
        return STAKE * (1 + self.validators.index(key)) if key in self.validators else STAKE

    def verdict(self, key: Key, role: "participation_pb2.Role.ValueType") -> None:
        """Eligible by stake."""
        evidence = participation_pb2.Evidence(
            kind=participation_pb2.EVIDENCE_KIND_STAKE,
            sufficient=True,
            amount_micros=self.stake_of(key),
            threshold_micros=STAKE,
        )
        verdict = participation_pb2.EligibilityVerdict(
            task=TASK, participant=named(key), role=role, eligible=True, evidence=[evidence]
        )
        self.write(Entry(verdict=verdict))

    def join(self, key: Key, role: "participation_pb2.Role.ValueType") -> None:
        """A verdict, a lock and a membership."""
        stake = self.stake_of(key)
        self.event(kind=stake_pb2.LEDGER_EVENT_KIND_LOCKED, participant=named(key), amount_micros=stake, task=TASK)
        weighs = 0
        if role == participation_pb2.ROLE_VALIDATOR:
            weighs = weight(stake, minimum_micros=STAKE, curve=SQUARE_ROOT)
            self.tree.append(key.id, weighs)
        self.event(
            kind=stake_pb2.LEDGER_EVENT_KIND_CANDIDATE_ADDED,
            participant=named(key),
            task=TASK,
            owner_group=key.id,
            weight=weighs,
        )
        self.verdict(key, role)
        statement = envelope_pb2.JoinStatement(origin=ORIGIN, task=TASK, participant=named(key), role=role)
        joined = log_type_pb2.MembershipChanged(
            task=TASK,
            participant=named(key),
            role=role,
            state=participation_pb2.MEMBERSHIP_STATE_ACTIVE,
            statement=sign_statement(key, statement),
        )
        self.write(Entry(membership_changed=joined))

    def commit_and_reveal(self) -> None:
        """The node's model."""
        who = named(self.node)
        commitment = submission_commitment(origin=ORIGIN, task=TASK, participant=who, model_digest=MODEL, salt=SALT)
        commit = envelope_pb2.CommitStatement(origin=ORIGIN, task=TASK, participant=who, commitment=commitment)
        committed = log_type_pb2.SubmissionCommitted(submission=SUBMISSION, statement=sign_statement(self.node, commit))
        self.write(Entry(submission_committed=committed))
        reveal = envelope_pb2.RevealStatement(origin=ORIGIN, submission=SUBMISSION, model_digest=MODEL, salt=SALT)
        revealed = log_type_pb2.SubmissionRevealed(submission=SUBMISSION, statement=sign_statement(self.node, reveal))
        self.write(Entry(submission_revealed=revealed))

    def draw(self) -> list[Key]:
        """Three of the four, who take their duties."""
        anchor = leaf_hash(self.leaves[-1])
        sigma = self.selector.sign(anchor)
        seed = draw_seed(sigma=sigma, reveal_salt=SALT)
        receipt = draw_pb2.DrawReceipt(
            draw=f"draws/{draw_id(SUBMISSION, 1)}",
            task=TASK,
            submission=SUBMISSION,
            round=1,
            anchor=anchor,
            sigma=sigma,
            reveal_salt=SALT,
            seed=seed,
            pool_root=self.tree.root(),
            pool_weight=self.tree.total.to_bytes(16, "big"),
            pool_size=len(self.tree),
            assigned=3,
        )
        for position, place in enumerate(list(draw(seed, self.tree))[:3]):
            group = self.tree.identifier(place.leaf_index)
            members = [f"participants/{group}"]
            pick = receipt.picks.add(
                position=position,
                place=place.place,
                participant=drawn_member(seed, place.place, members),
                owner_group=group,
                group_weight=place.weight.to_bytes(16, "big"),
                value=place.value.to_bytes(16, "big"),
                leaf_index=place.leaf_index,
                members=members,
            )
            pick.path = self.tree.path(place.leaf_index)
        receipt.draw_time.FromSeconds(self.draw_time_s)
        sign_receipts([receipt], self.selector.sign)
        self.write(Entry(draw=receipt))
        evaluating = evaluation_pb2.SUBMISSION_STATE_EVALUATING
        self.write(Entry(submission_changed=log_type_pb2.SubmissionChanged(submission=SUBMISSION, state=evaluating)))
        keys = {named(key): key for key in self.validators}
        for pick in receipt.picks:
            self.event(
                kind=stake_pb2.LEDGER_EVENT_KIND_QUOTA_CHARGED,
                participant=pick.participant,
                task=TASK,
                draw=receipt.draw,
                owner_group=pick.owner_group,
            )
            for state in (evaluation_pb2.ASSIGNMENT_STATE_OFFERED, evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED):
                duty = log_type_pb2.AssignmentChanged(
                    assignment=duty_of(keys[pick.participant]), state=state, position=pick.position
                )
                self.write(Entry(assignment_changed=duty))
        return [keys[pick.participant] for pick in receipt.picks]

    def evaluate(self, picks: list[Key], *, fault: int = 0) -> None:
        """Seals, reports, and the score; with a `fault` all report that instead of counts."""
        names, opened = [], []
        for key, correct in zip(picks, self.counted, strict=True):
            assignment = duty_of(key)
            said = envelope_pb2.EvaluationReport(
                origin=ORIGIN, assignment=assignment, dataset_digest=DATASET, model_digest=MODEL
            )
            if fault:
                said.fault = fault  # type: ignore[assignment]
            else:
                said.counts.CopyFrom(evaluation_pb2.Counts(correct=correct, total=10))
            report = sign_statement(key, said)
            seal = evaluation_seal(assignment=assignment, report=report.payload, salt=SALT)
            statement = envelope_pb2.SealStatement(origin=ORIGIN, assignment=assignment, seal=seal)
            names.append(assignment.replace("/assignments/", "/evaluations/"))
            sealed = log_type_pb2.EvaluationSealed(evaluation=names[-1], statement=sign_statement(key, statement))
            self.write(Entry(evaluation_sealed=sealed))
            opened.append(log_type_pb2.EvaluationOpened(evaluation=names[-1], report=report, salt=SALT))
        for each in opened:
            self.write(Entry(evaluation_opened=each))
        score = evaluation_pb2.Score(
            outcome=evaluation_pb2.SCORE_OUTCOME_SCORED,
            correct=self.score,
            total=10,
            tolerance=1,
            evaluations=names,
            round=1,
        )
        self.write(Entry(score_concluded=log_type_pb2.ScoreConcluded(submission=SUBMISSION, score=score)))
        scored = evaluation_pb2.SUBMISSION_STATE_SCORED
        self.write(Entry(submission_changed=log_type_pb2.SubmissionChanged(submission=SUBMISSION, state=scored)))

    def give_up(self, picks: list[Key], *, refunded: int = 3) -> None:
        """Release all who were drawn, refund the first `refunded` of them, and reject the submission."""
        for position, key in enumerate(picks):
            released = log_type_pb2.AssignmentChanged(
                assignment=duty_of(key), state=evaluation_pb2.ASSIGNMENT_STATE_RELEASED, position=position
            )
            self.write(Entry(assignment_changed=released))
        rejected = log_type_pb2.SubmissionChanged(
            submission=SUBMISSION,
            state=evaluation_pb2.SUBMISSION_STATE_REJECTED,
            reason=evaluation_pb2.REJECTION_REASON_VALIDATORS_UNAVAILABLE,
        )
        self.write(Entry(submission_changed=rejected))
        for key in picks[:refunded]:
            self.event(
                kind=stake_pb2.LEDGER_EVENT_KIND_QUOTA_REFUNDED,
                participant=named(key),
                task=TASK,
                draw=f"draws/{draw_id(SUBMISSION, 1)}",
                owner_group=key.id,
            )

    def end(self) -> None:
        """The task is closed and FINAL."""
        for state, reason in ((task_pb2.TASK_STATE_CLOSED, ""), (task_pb2.TASK_STATE_FINAL, "round 1 ranks")):
            self.write(Entry(task_changed=log_type_pb2.TaskChanged(task=TASK, state=state, reason=reason)))

    def record(self) -> Record:
        """The log, signed as it is."""
        root = root_hash([leaf_hash(leaf) for leaf in self.leaves])
        body = checkpoint_body(Checkpoint(ORIGIN, len(self.leaves), root))
        return Record(sign_note(self.log_key, name=ORIGIN, body=body), tuple(self.leaves))

    def board(self) -> leaderboard_pb2.Leaderboard:
        """What the registry shows."""
        low, high = wilson_interval(self.score, 10)
        entry = leaderboard_pb2.LeaderboardEntry(
            rank=1,
            participant=named(self.node),
            display_name=f"name of {self.node.id[:4]}",
            submission=SUBMISSION,
            correct=self.score,
            total=10,
            scored_submissions=1,
            interval_low=low,
            interval_high=high,
        )
        return leaderboard_pb2.Leaderboard(task=TASK, entries=[entry], round=1)

    def edit(self, kind: str, change: Callable[[log_type_pb2.LogEntry], None]) -> int:
        """Changes the first entry of a kind, as a dishonest registry would; its index."""
        for index, leaf in enumerate(self.leaves):
            entry = Entry.FromString(leaf)
            if entry.WhichOneof("entry") == kind:
                change(entry)
                self.leaves[index] = entry.SerializeToString(deterministic=True)
                return index
        raise LookupError(kind)

    def drop(self, kind: str) -> None:
        """Leaves out all entries of a kind."""
        self.leaves = [leaf for leaf in self.leaves if Entry.FromString(leaf).WhichOneof("entry") != kind]


def named(key: Key) -> str:
    """participants/{id}."""
    return f"participants/{key.id}"


def duty_of(key: Key) -> str:
    """A validator's assignment in the one round."""
    return f"{SUBMISSION}/assignments/1-{key.id}"
