"""The reading of a log: what the leaves so far say, when the leaf that is looked at was written, what was checked."""

from collections import defaultdict
from typing import TypeVar

from google.protobuf.message import Message

from tiltyard.audit.story import Story, Task
from tiltyard.audit.wrong import Claim, demand
from tiltyard.statements import open_statement
from tiltyard.type.v1 import envelope_pb2

M = TypeVar("M", bound=Message)


class Reading:
    """Where the reading stands. `counts` says how often each claim was checked."""

    def __init__(self) -> None:
        self.story = Story()
        self.counts: dict[Claim, int] = defaultdict(int)
        self.time_ns = 0
        """When the leaf that is looked at was written."""

    def open(self, envelope: envelope_pb2.Envelope, expected: type[M], *, by_participant: bool = True) -> tuple[M, str]:
        """The statement in an envelope and its signer as participants/{id}, who has registered; counted."""
        statement, signer = open_statement(envelope, expected)
        origin = getattr(statement, "origin")  # noqa: B009 - every statement has one, which Message does not know
        demand(origin == self.story.origin, Claim.ENVELOPES, f"the statement is of another arena: {origin}")
        demand(
            not by_participant or f"participants/{signer}" in self.story.participants,
            Claim.ENVELOPES,
            f"the statement is signed by {signer}, who has not registered",
        )
        self.counts[Claim.ENVELOPES] += 1
        return statement, f"participants/{signer}"

    def task(self, name: str) -> Task:
        """A task that was created before."""
        demand(name in self.story.tasks, Claim.HISTORY, f"{name} was never created")
        return self.story.tasks[name]
