"""The audit of a record: what is claimed, how often it was checked, and the first leaf where it does not hold."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tiltyard.audit.ledger import LedgerMismatch
from tiltyard.audit.rankings import difference, leaderboard
from tiltyard.audit.record import InvalidRecord, Record
from tiltyard.audit.replay import Replay
from tiltyard.audit.story import Story
from tiltyard.audit.wrong import Claim, Wrong
from tiltyard.identity import InvalidSignature
from tiltyard.registry.v1 import leaderboard_pb2
from tiltyard.transparency import InvalidNote, leaf_hash, parse_checkpoint, root_hash, verify_note

_LEAVES_A_WORD = 256


@dataclass(frozen=True)
class Failure:
    """Where a claim does not hold. `index` is the leaf's, None where it is no single leaf's fault."""

    claim: Claim
    index: int | None
    reason: str

    def __str__(self) -> str:
        return self.reason if self.index is None else f"leaf {self.index}: {self.reason}"


@dataclass(frozen=True)
class Check:
    """One claim, how many things were checked for it, and what was found first that does not hold."""

    claim: Claim
    count: int
    failure: Failure | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return self.failure is None


@dataclass(frozen=True)
class Audit:
    """What came out. `pending` counts what the log cannot show yet: ledger events that are still to come.

    The first leaf that waits for one was written at `pending_since_ns`, in nanoseconds since 1970; None where none is.
    """

    size: int
    checks: tuple[Check, ...]
    failures: tuple[Failure, ...]
    leaderboards: tuple[leaderboard_pb2.Leaderboard, ...]
    hidden: tuple[str, ...]
    """Tasks whose scores are only committed to."""
    pending: int
    pending_since_ns: int | None

    @property
    def passed(self) -> bool:
        """Whether every claim holds."""
        return not self.failures


@dataclass
class _Findings:
    counts: dict[Claim, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, claim: Claim, index: int | None, reason: str) -> None:
        self.failures.append(Failure(claim, index, reason))


def audit(
    record: Record,
    *,
    shown: Sequence[leaderboard_pb2.Leaderboard] = (),
    log_key: bytes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Checks everything. `shown` are leaderboards to be held against the log; `log_key`, raw Ed25519, pins the log.

    Without `log_key` the log's own genesis is believed to name its key. `progress` is told how many leaves of how many
    have been looked at.
    """
    findings = _Findings()
    _check_root(record, log_key, findings)
    replay = Replay()
    reading = replay.reading
    for index, leaf in enumerate(record.leaves):
        if progress and index % _LEAVES_A_WORD == 0:
            progress(index, len(record.leaves))
        try:
            entry = record.entries[index]
            replay.take(index, leaf_hash(leaf), entry)
        except Wrong as wrong:
            findings.add(wrong.claim, index, wrong.reason)
        except LedgerMismatch as error:
            findings.add(Claim.LEDGER, index, str(error))
        except InvalidRecord as error:
            findings.add(Claim.ROOT, None, str(error))
            break
        except (InvalidSignature, ValueError) as error:
            findings.add(Claim.ENVELOPES, index, str(error))
    for place, found in replay.settle():
        findings.add(found.claim, place, found.reason)
    boards = _check_leaderboards(reading.story, shown, reading.counts, findings)
    counts = {**reading.counts, Claim.ROOT: len(record.leaves)}
    oldest = replay.oldest_pending
    first = {failure.claim: failure for failure in reversed(findings.failures)}
    return Audit(
        size=len(record.leaves),
        checks=tuple(Check(claim, counts.get(claim, 0), first.get(claim)) for claim in Claim),
        failures=tuple(findings.failures),
        leaderboards=boards,
        hidden=tuple(name for name, task in reading.story.tasks.items() if task.hides),
        pending=replay.pending,
        pending_since_ns=None if oldest is None else record.entries[oldest].time.ToNanoseconds(),
    )


def _check_root(record: Record, log_key: bytes | None, findings: _Findings) -> None:
    try:
        genesis = record.genesis
        if log_key is not None and genesis.log_key != log_key:
            raise InvalidRecord("the genesis names another log key than the one expected")
        body = verify_note(record.note, name=genesis.origin, public_key=genesis.log_key)
        _check_one_signature(record.note[len(body) :])
        checkpoint = parse_checkpoint(body)
    except (InvalidRecord, InvalidNote) as error:
        findings.add(Claim.ROOT, None, str(error))
        return
    if checkpoint.origin != genesis.origin:
        findings.add(Claim.ROOT, None, f"the checkpoint is of {checkpoint.origin}, the genesis of {genesis.origin}")
    elif checkpoint.size != len(record.leaves):
        findings.add(Claim.ROOT, None, f"{len(record.leaves)} leaves came, {checkpoint.size} are signed")
    elif root_hash([leaf_hash(leaf) for leaf in record.leaves]) != checkpoint.root:
        findings.add(Claim.ROOT, None, "the leaves give another root than the checkpoint's")


def _check_one_signature(lines: str) -> None:
    """Nothing beside what is signed may change unseen: one signature line, its base64 in the one way there is."""
    signature = lines.rpartition(" ")[2].removesuffix("\n")
    if lines.count("\n") != 2 or base64.b64encode(base64.b64decode(signature)).decode() != signature:
        raise InvalidNote("the checkpoint holds more than the log's one signature")


def _check_leaderboards(
    story: Story, shown: Sequence[leaderboard_pb2.Leaderboard], counts: dict[Claim, int], findings: _Findings
) -> tuple[leaderboard_pb2.Leaderboard, ...]:
    made = {}
    for name in story.tasks:
        board = leaderboard(story, name)
        if board is not None:
            made[name] = board
    for board in shown:
        expected = made.get(board.task)
        if expected is None:
            findings.add(Claim.LEADERBOARDS, None, f"the log has no ranking of {board.task}")
            continue
        different = difference(board, expected)
        if different:
            findings.add(Claim.LEADERBOARDS, None, different)
    counts[Claim.LEADERBOARDS] = sum(len(board.entries) for board in made.values())
    return tuple(made.values())
