"""What holds for the contract as a whole: names, request ids, and that mutating methods remember them."""

import re
from pathlib import Path

from tests.unit.test_status import contract_services, servicers

# Writes that are idempotent by their own keys (task, participant, draw), not by a request id: the services' own calls.
KEYED = (
    "OpenPool",
    "AddCandidate",
    "RemoveCandidate",
    "ClosePool",
    "MergeOwnerGroups",
    "DrawValidators",
    "ExtendDraw",
    "SettleAssignment",
)
# Not stored by any service: a client stream resumed by its offset, a process told to end, a model server's memory.
OTHERS = ("UploadArtifact", "Drain", "RepositoryModelLoad", "RepositoryModelUnload")
ROOT = Path(__file__).parents[2]
# What is told of the caller's own state, which a program may act on.
CODES = "FailedPrecondition|AlreadyExists|ResourceExhausted|Aborted|OutOfRange|Unavailable"
RAISED = re.compile(rf'\b(?:{CODES})\(\s*"([A-Z_]+)"')
READS = re.compile("(Get|List|Watch|Check|Estimate|Download|Server|Model|RepositoryIndex)")


def test_every_method_that_changes_something_takes_a_request_id() -> None:
    without = [
        method.full_name
        for service in contract_services()
        for method in service.methods
        if not READS.match(method.name)
        and method.name not in (*KEYED, *OTHERS)
        and "request_id" not in method.input_type.fields_by_name
    ]

    assert without == []


def test_every_method_with_a_request_id_remembers_its_answer() -> None:
    forgetful = []
    for service in contract_services():
        for method in service.methods:
            if "request_id" in method.input_type.fields_by_name:
                built = [vars(base)[method.name] for s in servicers(service.name) for base in s.__mro__[:1]]
                # functools.wraps of @idempotent leaves this mark.
                if not built or not all(hasattr(function, "__wrapped__") for function in built):
                    forgetful.append(method.full_name)

    assert forgetful == []


def test_every_reason_stands_in_the_contract_or_among_those_of_any_call_or_that_operators_meet() -> None:
    told = "".join((ROOT / "docs/howto" / page).read_text() for page in ("debug-with-grpcurl.md", "host-the-arena.md"))
    told += "".join(path.read_text() for path in (ROOT / "protos").rglob("*.proto"))
    raised = {
        reason
        for service in ("runtime", "registry", "selector")
        for path in (ROOT / "services" / service).rglob("*.py")
        for reason in RAISED.findall(path.read_text())
    }

    assert len(raised) > 30
    assert sorted(reason for reason in raised if not re.search(rf"\b{reason}\b", told)) == []
