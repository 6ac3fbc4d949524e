"""Signs reports and seals with the validator's key."""

from services.validator.assignments import Order
from services.validator.redaction import published
from services.validator.runs import Fault, Finding
from tiltyard.commitments import evaluation_seal
from tiltyard.identity import Key
from tiltyard.predictions import prediction_root
from tiltyard.statements import sign_statement
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2

_MAX_DETAIL_CHARS = 500

FAULT_NUMBER = {
    Fault.NAN_OUTPUT: evaluation_pb2.MODEL_FAULT_NAN_OUTPUT,
    Fault.BAD_FORMAT: evaluation_pb2.MODEL_FAULT_BAD_FORMAT,
    Fault.SHAPE_MISMATCH: evaluation_pb2.MODEL_FAULT_SHAPE_MISMATCH,
    Fault.TOO_SLOW: evaluation_pb2.MODEL_FAULT_TOO_SLOW,
    Fault.OUT_OF_MEMORY: evaluation_pb2.MODEL_FAULT_OUT_OF_MEMORY,
    Fault.CRASHED: evaluation_pb2.MODEL_FAULT_CRASHED,
}


class KeyNotary:
    """Signs in the name of `key` for the arena `origin`."""

    def __init__(self, key: Key, origin: str) -> None:
        self._key = key
        self._origin = origin

    def report(self, assignment: str, order: Order, finding: Finding) -> bytes:
        """The signed report of a finding, a serialised envelope."""
        report = envelope_pb2.EvaluationReport(
            origin=self._origin,
            assignment=assignment,
            dataset_digest=bytes.fromhex(order.dataset_digest),
            model_digest=bytes.fromhex(order.model_digest),
            detail=published(finding.detail, max_chars=_MAX_DETAIL_CHARS),
            node_endpoint=finding.node_endpoint,
        )
        if finding.counts is not None:
            report.counts.CopyFrom(
                evaluation_pb2.Counts(
                    correct=finding.counts.correct,
                    total=finding.counts.total,
                    ambiguous=finding.counts.ambiguous,
                    loss_sum_micros=finding.counts.loss_sum_micros,
                )
            )
            report.prediction_root = prediction_root(finding.prediction_blocks)
            report.prediction_blocks = len(finding.prediction_blocks)
        elif finding.fault is not None:
            report.fault = FAULT_NUMBER[finding.fault]
        return sign_statement(self._key, report).SerializeToString(deterministic=True)

    def seal(self, assignment: str, report: bytes, salt: bytes) -> bytes:
        """The signed seal of a report made by `report`, a serialised envelope."""
        payload = envelope_pb2.Envelope.FromString(report).payload
        seal = evaluation_seal(assignment=assignment, report=payload, salt=salt)
        statement = envelope_pb2.SealStatement(origin=self._origin, assignment=assignment, seal=seal)
        return sign_statement(self._key, statement).SerializeToString(deterministic=True)
