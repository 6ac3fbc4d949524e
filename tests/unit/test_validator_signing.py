"""Reports and seals are the same bytes each time, and what anyone can check."""

import pytest

from services.runtime.fields import FieldChecks
from services.validator.assignments import Order
from services.validator.redaction import published
from services.validator.runs import Fault, Finding
from services.validator.signing import KeyNotary
from tiltyard.commitments import evaluation_seal
from tiltyard.counting import Counts
from tiltyard.identity import Key
from tiltyard.modelspec import Linear, ModelSpec
from tiltyard.predictions import prediction_root
from tiltyard.statements import open_statement
from tiltyard.type.v1 import envelope_pb2, evaluation_pb2

NAME = f"tasks/t/submissions/1/assignments/1-{'a' * 40}"
ORDER = Order("d" * 64, 1, "e" * 64, 1, ModelSpec((4,), 2, Linear()), max_cpu_s=1, max_memory_bytes=1)


def found(blocks: int) -> Finding:
    return Finding(counts=Counts(1, 2, 3, -4), prediction_blocks=(bytes(32),) * blocks)


def test_a_report_states_what_was_found():
    key = Key.generate()
    notary = KeyNotary(key, "tiltyard.local")
    report = notary.report(NAME, ORDER, found(2))
    assert report == notary.report(NAME, ORDER, found(2))
    statement, signer = open_statement(envelope_pb2.Envelope.FromString(report), envelope_pb2.EvaluationReport)
    assert signer == key.id
    assert (statement.origin, statement.assignment) == ("tiltyard.local", NAME)
    assert (statement.dataset_digest, statement.model_digest) == (b"\xdd" * 32, b"\xee" * 32)
    assert statement.counts == evaluation_pb2.Counts(correct=1, total=2, ambiguous=3, loss_sum_micros=-4)
    assert (statement.prediction_root, statement.prediction_blocks) == (prediction_root([bytes(32)] * 2), 2)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_fault_is_stated_without_counts(fault):
    report = KeyNotary(Key.generate(), "o").report(NAME, ORDER, Finding(fault=fault, detail="d" * 600))
    statement, _ = open_statement(envelope_pb2.Envelope.FromString(report), envelope_pb2.EvaluationReport)
    assert evaluation_pb2.ModelFault.Name(statement.fault) == f"MODEL_FAULT_{fault}"
    assert statement.WhichOneof("finding") == "fault"
    assert len(statement.detail) == 500


@pytest.mark.parametrize(
    ("told", "stated"),
    [
        (
            "unix:/tmp/run/socket: cannot open '/home/ada/model.onnx', at /layer1/conv/Conv of a/b/c, 1/2",
            "unix:socket: cannot open 'model.onnx', at /layer1/conv/Conv of a/b/c, 1/2",
        ),
        (f"no space left: '/arena/state/cache/{'d' * 64}.part'", f"no space left: '{'d' * 64}.part'"),
        ("cannot open /arena/state/children/tmp0/spec.json", "cannot open spec.json"),
    ],
)
def test_a_report_holds_no_folder_of_the_machine_and_keeps_a_graphs_names(told, stated):
    report = KeyNotary(Key.generate(), "o").report(NAME, ORDER, Finding(fault=Fault.CRASHED, detail=told))
    statement, _ = open_statement(envelope_pb2.Envelope.FromString(report), envelope_pb2.EvaluationReport)
    assert statement.detail == stated


def test_what_lies_on_the_disk_makes_no_difference_to_what_is_said(monkeypatch):
    def never(*arguments):
        raise AssertionError

    for module, name in (("os", "stat"), ("os", "lstat"), ("os.path", "exists"), ("os", "scandir")):
        monkeypatch.setattr(f"{module}.{name}", never)
    for told, stated in (("/validator-7/b", "/validator-7/b"), ("/etc/b", "b"), ("/private/b", "b")):
        assert published(told, max_chars=100) == stated


@pytest.mark.parametrize("name", ["a" * 300, "é" * 130])
def test_a_name_of_a_graph_longer_than_any_folders_stands_as_it_is(name):
    told = f"the graph failed: Non-zero status code returned while running Reshape node. Name:'/{name}/b'"
    report = KeyNotary(Key.generate(), "o").report(NAME, ORDER, Finding(fault=Fault.CRASHED, detail=told))
    statement, _ = open_statement(envelope_pb2.Envelope.FromString(report), envelope_pb2.EvaluationReport)
    assert statement.detail == told


@pytest.mark.parametrize(
    ("told", "stated"),
    [
        ("Name:'a\nb\x00\x1b[2Jc'", "Name:'a b [2Jc'"),
        ("\u202e\ud800 \u2028", ""),
        ("\n" + "x y " * 200, ("x y " * 125)),
    ],
)
def test_whatever_a_model_is_named_the_registry_takes_what_is_said_of_it(told, stated):
    report = KeyNotary(Key.generate(), "o").report(NAME, ORDER, Finding(fault=Fault.CRASHED, detail=told))
    statement, _ = open_statement(envelope_pb2.Envelope.FromString(report), envelope_pb2.EvaluationReport)
    assert statement.detail == stated
    checks = FieldChecks()
    assert checks.text("report.detail", statement.detail, min_chars=0, max_chars=500)


def test_a_seal_binds_the_report_and_its_salt():
    notary = KeyNotary(Key.generate(), "o")
    report = notary.report(NAME, ORDER, found(1))
    envelope = envelope_pb2.Envelope.FromString(notary.seal(NAME, report, bytes(32)))
    statement, _ = open_statement(envelope, envelope_pb2.SealStatement)
    payload = envelope_pb2.Envelope.FromString(report).payload
    assert statement.seal == evaluation_seal(assignment=NAME, report=payload, salt=bytes(32))


def test_a_report_stays_small_however_many_rows_there_are():
    report = KeyNotary(Key.generate(), "o").report(NAME, ORDER, found(100_000))
    assert len(report) < 1000
