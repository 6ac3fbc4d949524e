"""The vectors of audits for all languages hold for this implementation too: honest logs pass, and each lie is found."""

import json
from typing import Any

import pytest

from tests.support.audit_vectors import CASES, as_document, read_case, read_logs
from tiltyard.audit import Claim

LOGS = read_logs()
DOCUMENTS: list[dict[str, Any]] = json.loads(CASES.read_text())["cases"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: each["name"][:60])
def test_what_is_found_is_what_the_vectors_say(document: dict[str, Any]) -> None:
    case = read_case(document)
    assert as_document(case, case.audit(LOGS[case.log])) == document


def test_every_claim_is_belied_and_only_honest_logs_pass() -> None:
    assert {claim for document in DOCUMENTS for claim, _ in document["found"]} == {each.name.lower() for each in Claim}
    assert [document["name"] for document in DOCUMENTS if not document["found"]] == [
        "an honest log: submission",
        "an honest log: arena",
    ]
