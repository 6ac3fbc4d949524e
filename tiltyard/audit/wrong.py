"""What an audit claims of a log, and what it raises where a leaf belies it."""

from enum import StrEnum

from google.protobuf.timestamp_pb2 import Timestamp


class Claim(StrEnum):
    """What holds in a log that passes; docs/transparency.md tells how each is checked."""

    ROOT = "the checkpoint's root is the root of all leaves, and its note is signed"
    ENVELOPES = "every envelope in the log is signed by whom it names"
    HISTORY = "every task, membership, submission and assignment goes the way that the rules allow"
    VERDICTS = "every eligibility verdict follows from its evidence"
    LEDGER = "every balance, weight and charge follows from the ledger's events before it"
    COMMITMENTS = "every revealed model is the one committed to"
    DRAWS = "every draw follows from the reveal, the selector's signature and the pool"
    POOLS = "every draw's pool root is that of the pool which the ledger's events give"
    SEALS = "every opened report is the one sealed"
    SCORES = "every score is the lower median of the opened reports"
    LEADERBOARDS = "the leaderboard follows from the scores"


class Wrong(Exception):
    """A leaf that does not follow from the leaves before it."""

    def __init__(self, claim: Claim, reason: str) -> None:
        super().__init__(reason)
        self.claim = claim
        self.reason = reason


def moment_ns(time: Timestamp, claim: Claim, what: str) -> int:
    """A moment in nanoseconds since 1970. Raises Wrong, saying of `what` it is, for one that there is not."""
    try:
        return time.ToNanoseconds()
    except ValueError:
        raise Wrong(claim, f"{what} bears a time that there is not") from None


def demand(true: bool, claim: Claim, otherwise: str) -> None:
    """Raises Wrong unless it is true."""
    if not true:
        raise Wrong(claim, otherwise)
