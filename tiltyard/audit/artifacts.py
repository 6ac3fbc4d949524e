"""The files that a log speaks of: datasets by their announced digests, models by their tasks and reveals."""

import contextlib

from tiltyard.audit.record import Record
from tiltyard.statements import InvalidSignature, open_statement
from tiltyard.type.v1 import envelope_pb2


def named_digests(record: Record, task: str = "") -> set[str]:
    """SHA-256 digests in hex of all that leaves name, or of one task's (tasks/{task}).

    What cannot be read names nothing here: of a log that is not honest it is the audit that tells.
    """
    named = set()
    for _, entry in record.of_kind("task_created"):
        created = entry.task_created
        if task in ("", created.task):
            named |= {created.config.evaluation_dataset.sha256, created.config.holdout.sha256}
            with contextlib.suppress(ValueError):
                named.add(bytes.fromhex(created.config.base_model.removeprefix("artifacts/")))
    for _, entry in record.of_kind("submission_revealed"):
        revealed = entry.submission_revealed
        if not task or revealed.submission.startswith(f"{task}/submissions/"):
            with contextlib.suppress(InvalidSignature, ValueError):
                named.add(open_statement(revealed.statement, envelope_pb2.RevealStatement)[0].model_digest)
    return {digest.hex() for digest in named if digest}
