"""What the demo verifies: a small record by hand passes, and every change to it is found by the right check."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tiltyard.bls import BlsKey
from tiltyard.cli.demo.verification import Check, Record, verify
from tiltyard.commitments import draw_seed, evaluation_seal, submission_commitment
from tiltyard.identity import Key
from tiltyard.registry.v1 import leaderboard_pb2, log_pb2, submission_pb2
from tiltyard.sortition import SumTree, draw, draw_id, drawn_member
from tiltyard.statements import sign_statement
from tiltyard.transparency import Checkpoint, checkpoint_body, leaf_hash, root_hash, sign_note
from tiltyard.type.v1 import draw_pb2, envelope_pb2, evaluation_pb2
from tiltyard.type.v1 import log_pb2 as log_type_pb2

ORIGIN = "tiltyard.test"
TASK = "tasks/t"
SUBMISSION = f"{TASK}/submissions/1"
MODEL = hashlib.sha256(b"model").digest()
SALT = bytes(range(32))
Entry = log_type_pb2.LogEntry


@dataclass
class Story:
    """A record in the making: one submission, judged by three of four validators who counted 7, 8 and 8 of 10."""

    log_key: Key = field(default_factory=Key.generate)
    selector: BlsKey = field(default_factory=lambda: BlsKey(bytes(32)))
    node: Key = field(default_factory=Key.generate)
    validators: list[Key] = field(default_factory=lambda: [Key.generate() for _ in range(4)])
    counted: tuple[int, ...] = (8, 7, 8)
    score: int = 8
    leaves: list[bytes] = field(default_factory=list)

    def write(self, entry: log_type_pb2.LogEntry) -> None:
        self.leaves.append(entry.SerializeToString(deterministic=True))

    def tell(self) -> None:
        self.write(
            Entry(
                genesis=log_type_pb2.Genesis(
                    origin=ORIGIN, log_key=self.log_key.public_bytes, selector_key=self.selector.public_key
                )
            )
        )
        self.commit_and_reveal()
        picks = self.draw()
        self.evaluate(picks)

    def commit_and_reveal(self) -> None:
        who = f"participants/{self.node.id}"
        commitment = submission_commitment(origin=ORIGIN, task=TASK, participant=who, model_digest=MODEL, salt=SALT)
        commit = envelope_pb2.CommitStatement(origin=ORIGIN, task=TASK, participant=who, commitment=commitment)
        reveal = envelope_pb2.RevealStatement(origin=ORIGIN, submission=SUBMISSION, model_digest=MODEL, salt=SALT)
        self.write(
            Entry(
                submission_committed=log_type_pb2.SubmissionCommitted(
                    submission=SUBMISSION, statement=sign_statement(self.node, commit)
                )
            )
        )
        self.write(
            Entry(
                submission_revealed=log_type_pb2.SubmissionRevealed(
                    submission=SUBMISSION, statement=sign_statement(self.node, reveal)
                )
            )
        )

    def draw(self) -> list[str]:
        ids = sorted(key.id for key in self.validators)
        tree = SumTree([(each, 10 + place) for place, each in enumerate(ids)])
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
            pool_root=tree.root(),
            pool_weight=tree.total.to_bytes(16, "big"),
            pool_size=len(tree),
            assigned=3,
        )
        order = list(draw(seed, tree))
        for position, place in enumerate(order[:3]):
            members = [f"participants/{ids[place.leaf_index]}"]
            pick = receipt.picks.add(
                position=position,
                place=place.place,
                participant=drawn_member(seed, place.place, members),
                owner_group=ids[place.leaf_index],
                group_weight=place.weight.to_bytes(16, "big"),
                value=place.value.to_bytes(16, "big"),
                leaf_index=place.leaf_index,
                members=members,
            )
            for node in tree.path(place.leaf_index):
                pick.path.add(hash=node.hash, sum=node.sum.to_bytes(16, "big"), left=node.left)
        digest = hashlib.sha256(receipt.SerializeToString(deterministic=True)).digest()
        receipt.signature = self.selector.sign(digest)
        self.write(Entry(draw=receipt))
        return [pick.participant.removeprefix("participants/") for pick in receipt.picks]

    def evaluate(self, picks: list[str]) -> None:
        keys = {key.id: key for key in self.validators}
        names = []
        opened = []
        for who, correct in zip(picks, self.counted, strict=True):
            assignment = f"{SUBMISSION}/assignments/1-{who}"
            report = sign_statement(
                keys[who],
                envelope_pb2.EvaluationReport(
                    origin=ORIGIN,
                    assignment=assignment,
                    model_digest=MODEL,
                    counts=evaluation_pb2.Counts(correct=correct, total=10),
                ),
            )
            seal = evaluation_seal(assignment=assignment, report=report.payload, salt=SALT)
            statement = envelope_pb2.SealStatement(origin=ORIGIN, assignment=assignment, seal=seal)
            name = f"{SUBMISSION}/evaluations/1-{who}"
            names.append(name)
            self.write(
                Entry(
                    evaluation_sealed=log_type_pb2.EvaluationSealed(
                        evaluation=name, statement=sign_statement(keys[who], statement)
                    )
                )
            )
            opened.append(
                Entry(evaluation_opened=log_type_pb2.EvaluationOpened(evaluation=name, report=report, salt=SALT))
            )
        for entry in opened:
            self.write(entry)
        score = evaluation_pb2.Score(
            outcome=evaluation_pb2.SCORE_OUTCOME_SCORED, correct=self.score, total=10, evaluations=names, round=1
        )
        self.write(Entry(score_concluded=log_type_pb2.ScoreConcluded(submission=SUBMISSION, score=score)))

    def record(self) -> Record:
        root = root_hash([leaf_hash(leaf) for leaf in self.leaves])
        body = checkpoint_body(Checkpoint(ORIGIN, len(self.leaves), root))
        note = sign_note(self.log_key, name=ORIGIN, body=body)
        return Record(
            log_pb2.Checkpoint(origin=ORIGIN, size=len(self.leaves), root_hash=root, note=note), tuple(self.leaves)
        )

    def checks(self, record: Record | None = None) -> list[Check]:
        who = f"participants/{self.node.id}"
        submission = submission_pb2.Submission(
            name=SUBMISSION,
            participant=who,
            state=evaluation_pb2.SUBMISSION_STATE_SCORED,
            score=evaluation_pb2.Score(correct=self.score, total=10, round=1),
        )
        entry = leaderboard_pb2.LeaderboardEntry(
            rank=1, participant=who, submission=SUBMISSION, correct=self.score, total=10
        )
        board = leaderboard_pb2.Leaderboard(task=TASK, entries=[entry])
        return verify(record or self.record(), TASK, [submission], board)

    def edit(self, kind: str, change: Callable[[log_type_pb2.LogEntry], None]) -> None:
        """Changes every entry of a kind; the log is signed anew, as by a dishonest registry."""
        for index, leaf in enumerate(self.leaves):
            entry = Entry.FromString(leaf)
            if entry.WhichOneof("entry") == kind:
                change(entry)
                self.leaves[index] = entry.SerializeToString(deterministic=True)


@pytest.fixture
def story() -> Story:
    told = Story()
    told.tell()
    return told


def failures(checks: list[Check]) -> list[str]:
    return [check.claim for check in checks if not check.passed]


def test_an_honest_record_passes(story: Story) -> None:
    checks = story.checks()
    assert failures(checks) == [], [check.detail for check in checks]
    assert len(checks) == 7


def test_every_changed_leaf_is_found(story: Story) -> None:
    honest = story.record()
    for index, leaf in enumerate(honest.leaves):
        changed = bytearray(leaf)
        changed[len(leaf) // 2] ^= 1
        leaves = (*honest.leaves[:index], bytes(changed), *honest.leaves[index + 1 :])
        assert failures(story.checks(Record(honest.checkpoint, leaves)))


@pytest.mark.parametrize("change", ["drop", "swap", "add"])
def test_the_order_and_number_of_leaves_is_signed(story: Story, change: str) -> None:
    honest = story.record()
    leaves = list(honest.leaves)
    if change == "drop":
        del leaves[-1]
    elif change == "swap":
        leaves[-1], leaves[-2] = leaves[-2], leaves[-1]
    else:
        leaves.append(leaves[-1])
    assert "root" in failures(story.checks(Record(honest.checkpoint, tuple(leaves))))[0]


def test_a_checkpoint_signed_by_another_key_is_found(story: Story) -> None:
    story.log_key = Key.generate()
    assert "note" in failures(story.checks())[0]


def test_a_score_that_is_not_the_median_is_found() -> None:
    story = Story(score=9)
    story.tell()
    assert failures(story.checks()) == ["every score is the lower median of the opened reports"]


def test_a_score_without_its_reports_is_found(story: Story) -> None:
    story.leaves = [leaf for leaf in story.leaves if not Entry.FromString(leaf).HasField("evaluation_opened")]
    assert "every score is the lower median of the opened reports" in failures(story.checks())


def clear_salt(entry: log_type_pb2.LogEntry) -> None:
    entry.evaluation_opened.salt = bytes(32)


def exchange_signature(entry: log_type_pb2.LogEntry) -> None:
    entry.submission_committed.statement.signature = bytes(64)


def other_seed(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.seed = bytes(32)


def other_pick(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.picks[0].participant = entry.draw.picks[1].participant


def other_order(entry: log_type_pb2.LogEntry) -> None:
    first, second = entry.draw.picks[0], entry.draw.picks[1]
    first.place, second.place = second.place, first.place


def other_anchor(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.anchor = bytes(32)


def heavier(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.picks[0].group_weight = (10**6).to_bytes(16, "big")


def unsigned(entry: log_type_pb2.LogEntry) -> None:
    entry.draw.signature = bytes(96)


@pytest.mark.parametrize(
    ("kind", "change", "claim"),
    [
        ("evaluation_opened", clear_salt, "every opened report is the one sealed"),
        ("submission_committed", exchange_signature, "every envelope"),
        ("draw", other_seed, "every draw"),
        ("draw", other_pick, "every draw"),
        ("draw", other_order, "every draw"),
        ("draw", other_anchor, "every draw"),
        ("draw", heavier, "every draw"),
        ("draw", unsigned, "every draw"),
    ],
)
def test_a_dishonest_registry_is_found(
    story: Story, kind: str, change: Callable[[log_type_pb2.LogEntry], None], claim: str
) -> None:
    story.edit(kind, change)
    assert failures(story.checks())[0].startswith(claim)


def test_a_model_other_than_the_committed_one_is_found() -> None:
    story = Story()
    story.write(Entry(genesis=log_type_pb2.Genesis(origin=ORIGIN, log_key=story.log_key.public_bytes)))
    story.commit_and_reveal()
    reveal = envelope_pb2.RevealStatement(origin=ORIGIN, submission=SUBMISSION, model_digest=bytes(32), salt=SALT)
    story.edit(
        "submission_revealed",
        lambda entry: entry.submission_revealed.statement.CopyFrom(sign_statement(story.node, reveal)),
    )
    assert "every revealed model is the one committed to" in failures(story.checks())


def test_a_report_signed_by_somebody_else_is_found(story: Story) -> None:
    def forge(entry: log_type_pb2.LogEntry) -> None:
        report = envelope_pb2.EvaluationReport.FromString(entry.evaluation_opened.report.payload)
        entry.evaluation_opened.report.CopyFrom(sign_statement(Key.generate(), report))

    story.edit("evaluation_opened", forge)
    assert failures(story.checks())[0].startswith("every envelope")


def test_an_empty_record_verifies_nothing() -> None:
    checks = Story().checks(Record(log_pb2.Checkpoint(), ()))
    assert all(not check.passed for check in checks[:6])
