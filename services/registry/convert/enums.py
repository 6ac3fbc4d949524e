"""The domain's enums and the contract's: the same member names, the contract's with a prefix."""

from enum import Enum
from typing import Any, Generic, TypeVar

from services.registry import states
from tiltyard.registry.v1 import evaluation_pb2 as registry_evaluation_pb2
from tiltyard.type.v1 import evaluation_pb2, model_pb2, participation_pb2, task_pb2

E = TypeVar("E", bound=Enum)


class EnumWords(Generic[E]):
    """One enum in both worlds. Building it fails where the contract has other members than the domain."""

    def __init__(self, members: type[E], contract: Any, prefix: str) -> None:
        self._number_of = {member: int(contract.Value(prefix + member.name)) for member in members}
        self._member_of = {number: member for member, number in self._number_of.items()}
        self._member_of_name = {spelling: m for m in members for spelling in (m.name, prefix + m.name)}
        unknown = set(contract.values()) - set(self._member_of) - {0}
        if unknown:
            raise TypeError(f"{members.__name__} lacks {[contract.Name(number) for number in unknown]}")

    @property
    def numbers(self) -> frozenset[int]:
        """The contract's numbers that are set and known."""
        return frozenset(self._member_of)

    def number(self, member: E | None) -> Any:
        """The contract's number, 0 for none. Any, for each stub has an integer type of its own."""
        return 0 if member is None else self._number_of[member]

    def member(self, number: int) -> E:
        """The domain's member. Raises KeyError for 0 and unknown numbers."""
        return self._member_of[number]

    def named(self, name: str) -> E | None:
        """The member that a filter names, in the contract's spelling or without its prefix."""
        return self._member_of_name.get(name)


ROLE = EnumWords(states.Role, participation_pb2.Role, "ROLE_")
MEMBERSHIP_STATE = EnumWords(states.MembershipState, participation_pb2.MembershipState, "MEMBERSHIP_STATE_")
TASK_STATE = EnumWords(states.TaskState, task_pb2.TaskState, "TASK_STATE_")
LOSS = EnumWords(states.Loss, task_pb2.Loss, "LOSS_")
METRIC = EnumWords(states.Metric, task_pb2.Metric, "METRIC_")
SCORE_VISIBILITY = EnumWords(states.ScoreVisibility, task_pb2.ScoreVisibility, "SCORE_VISIBILITY_")
CURVE = EnumWords(states.Curve, task_pb2.Curve, "CURVE_")
MODEL_FORMAT = EnumWords(states.ModelFormat, model_pb2.ModelFormat, "MODEL_FORMAT_")
SUBMISSION_STATE = EnumWords(states.SubmissionState, evaluation_pb2.SubmissionState, "SUBMISSION_STATE_")
REJECTION_REASON = EnumWords(states.RejectionReason, evaluation_pb2.RejectionReason, "REJECTION_REASON_")
VALIDATOR_FAULT_KIND = EnumWords(states.ValidatorFaultKind, evaluation_pb2.ValidatorFaultKind, "VALIDATOR_FAULT_KIND_")
ASSIGNMENT_STATE = EnumWords(states.AssignmentState, evaluation_pb2.AssignmentState, "ASSIGNMENT_STATE_")
EVALUATION_VERDICT = EnumWords(
    states.EvaluationVerdict, registry_evaluation_pb2.EvaluationVerdict, "EVALUATION_VERDICT_"
)
