"""Checks a whole record log from its leaves alone: signatures, commitments, draws, pools, verdicts, scores, rankings.

docs/transparency.md says what each claim means and what no log can show.
"""

from tiltyard.audit.claims import Audit, Check, Failure, audit
from tiltyard.audit.record import InvalidRecord, Record, read_record, write_record
from tiltyard.audit.wrong import Claim

__all__ = [
    "Audit",
    "Check",
    "Claim",
    "Failure",
    "InvalidRecord",
    "Record",
    "audit",
    "read_record",
    "write_record",
]
