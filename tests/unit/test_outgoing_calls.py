"""No call without a deadline, no change that may be made twice: held against the source and the contract."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import MethodDescriptor

import services
import tiltyard

# Channels of tiltyard.calls.channel give each call a deadline. These open others, to what is none of our services, or
# before and after all else runs; and calls over those channels are made here.
WITHOUT_OURS = {
    "services/runtime/healthcheck.py",
    "services/validator/elsewhere.py",
    "services/validator/endpoints.py",
    "services/validator/fleet.py",
    "services/validator/nodes.py",
    "services/validator/pipeline.py",
    "tiltyard/calls/channel.py",
    "tiltyard/cli/supervisor.py",
}
SHAPES = {"unary_unary", "unary_stream", "stream_unary", "stream_stream"}

# Changes without a request id: keyed by what they change, so that a second call finds the first one's work.
KEYED = {
    "UploadArtifact",  # the artifact's digest and the offset
    "OpenPool",
    "AddCandidate",
    "RemoveCandidate",
    "MergeOwnerGroups",
    "ClosePool",
    "CheckEligibility",  # asks; the registry records what it hears
    "DrawValidators",
    "ExtendDraw",
    "SettleAssignment",
    "EstimateOdds",  # asks
    "Drain",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "RepositoryIndex",  # asks
    "ModelInfer",  # asks
    "ModelStreamInfer",  # asks
    "ModelReady",
    "ModelMetadata",
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
}
READS = ("Get", "List", "Watch", "Download")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in (tiltyard, services):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield str(path.relative_to(root.parent)), ast.parse(path.read_text())


def methods() -> list[MethodDescriptor]:
    found = []
    root = Path(next(iter(tiltyard.__path__)))
    for path in sorted(root.rglob("*_pb2.py")):
        module = importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
        for service in module.DESCRIPTOR.services_by_name.values():
            found.extend(service.methods)
    return found


def calls_in(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def test_channels_are_opened_in_one_place() -> None:
    opening = {
        file
        for file, tree in sources()
        if any(name_of(call) in ("insecure_channel", "secure_channel") for call in calls_in(tree))
    }
    assert opening - WITHOUT_OURS == set()
    assert "tiltyard/calls/channel.py" in opening


def without_deadline(tree: ast.Module, rpcs: set[str]) -> list[int]:
    """The lines of calls over gRPC that name no deadline."""
    callables = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call)
        if name_of(node.value) in SHAPES
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return [
        call.lineno
        for call in calls_in(tree)
        if name_of(call) in rpcs | {"future"} | callables
        if not any(keyword.arg == "timeout" for keyword in call.keywords)
    ]


def test_every_call_over_another_channel_names_its_deadline() -> None:
    rpcs = {method.name for method in methods()} | {"Check", "Watch"}
    missing = {
        f"{file}:{line}"
        for file, tree in sources()
        if file in WITHOUT_OURS and file != "tiltyard/calls/channel.py"
        for line in without_deadline(tree, rpcs)
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("stub.GetTask(r, timeout=3)", []),
        ("stub.GetTask(r)", [1]),
        ("stub.GetTask.future(r)", [1]),
        ("call = channel.unary_unary('/x')\ncall(r)", [2]),
        ("call: C = channel.stream_stream('/x')\ncall(r, timeout=t)", []),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, lines: list[int]) -> None:
    assert without_deadline(ast.parse(source), {"GetTask"}) == lines


def test_every_change_may_be_repeated() -> None:
    """Channels repeat what was UNAVAILABLE, and give each message with a `request_id` one."""
    unsafe = [
        method.full_name
        for method in methods()
        if not method.name.startswith(READS)
        if "request_id" not in method.input_type.fields_by_name
        if method.name not in KEYED
    ]
    assert unsafe == []
    assert {method.name for method in methods()} >= KEYED
