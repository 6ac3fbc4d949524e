"""One evaluation over several servers: all of them work, and one that fails costs only what it had in flight."""

import socket
import struct
import threading
import time
import tracemalloc
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from safetensors.numpy import save_file

from services.runtime.errors import ResourceExhausted
from services.runtime.rpc_errors import to_rpc_status
from services.validator import elsewhere
from services.validator import fleet as fleet_module
from services.validator.elsewhere import connected
from services.validator.fleet import WINDOW, Endpoint, Fleet, ModelServer, parse_servers
from services.validator.pipeline import RequestRefused, StreamBroken, StreamCancelled, WrongAnswer
from services.validator.rows import EvaluationRows
from tests.support.wiretap import labels_in, tapped
from tests.unit.test_tracing import Kept
from tiltyard.identity import Key, verify_token
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc
from tiltyard.telemetry import tracing

ROWS, WIDTH, STEP = 2000, 5, 10
LABELS = np.random.default_rng(1).permutation(np.arange(10_000, 60_000))[:ROWS]


class Server(rpc.GRPCInferenceServiceServicer):
    """Answers each row with its first two features, unless `spoil` does something else. Keeps what came."""

    def __init__(self, spoil=None, *, typed=False):
        self.requests = []
        self.traces = []
        self._spoil = spoil
        self._typed = typed

    def ModelInfer(self, request, context):
        self.requests.append(request)
        self.traces.append(dict(context.invocation_metadata()).get("traceparent"))
        x = np.frombuffer(request.raw_input_contents[0], dtype=np.uint8).reshape(tuple(request.inputs[0].shape))
        logits = x[:, :2].astype("<f4")
        answer = pb.ModelInferResponse(id=request.id)
        answer.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        if self._typed:
            answer.outputs[0].contents.fp32_contents.extend(logits.ravel())
        else:
            answer.raw_output_contents.append(logits.tobytes())
        if self._spoil:
            self._spoil(answer, context, len(self.requests))
        return answer


@contextmanager
def serving(*servers):
    with ExitStack() as stack:
        endpoints = []
        for index, server in enumerate(servers):
            running = grpc.server(futures.ThreadPoolExecutor(8))
            rpc.add_GRPCInferenceServiceServicer_to_server(server, running)
            port = running.add_insecure_port("127.0.0.1:0")
            running.start()
            stack.callback(lambda running=running: running.stop(0).wait())
            server.tap = stack.enter_context(tapped(f"127.0.0.1:{port}"))
            channel = stack.enter_context(grpc.insecure_channel(server.tap.address))
            endpoints.append(Endpoint(f"s{index}", channel, lambda: (("authorization", "Bearer t"),)))
        yield endpoints


@pytest.fixture
def rows(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH), dtype=np.uint8)
    save_file({"x": x, "y": LABELS}, tmp_path / "d")
    with EvaluationRows.open(tmp_path / "d") as opened:
        yield opened


def evaluated(rows, fleet):
    """What the fleet answered, row by row."""
    taken = []

    def take(start, stop, logits):
        assert start == sum(map(len, taken))
        taken.append(logits.copy())

    fleet.run(rows, take)
    return np.concatenate(taken)


def expected(rows):
    return np.frombuffer(rows.features(0, ROWS), np.uint8).reshape(ROWS, WIDTH)[:, :2]


def fleet_of(endpoints, **options):
    return Fleet(endpoints, model="m", outputs=2, rows_per_batch=STEP, **options)


def test_servers_share_an_evaluation_and_no_label_is_on_the_wire(rows):
    servers = [Server(), Server(typed=True), Server()]
    with serving(*servers) as endpoints:
        fleet = fleet_of(endpoints)
        assert np.array_equal(evaluated(rows, fleet), expected(rows))
    assert fleet.troubles() == {}
    assert all(server.requests for server in servers)
    assert sum(len(server.requests) for server in servers) == ROWS // STEP
    wire = b"".join(server.tap.sent for server in servers)
    assert rows.features(0, STEP) in wire
    assert labels_in(wire, LABELS.tolist()) == []


def test_each_batch_is_part_of_the_evaluations_trace_here_and_on_the_server(rows):
    server, kept = Server(), Kept()
    tracing.install(kept)
    try:
        with (
            serving(server),
            tracing.span("evaluate") as evaluation,
            connected(
                "gpu", server.tap.address, key=Key.generate(), audience="", credentials=None, peer="gpu:7405"
            ) as endpoint,
        ):
            assert np.array_equal(evaluated(rows, fleet_of([endpoint])), expected(rows))
            # A call's span ends a moment after its answer has come.
            until = time.monotonic() + 10
            while len(kept.spans) < ROWS // STEP and time.monotonic() < until:
                time.sleep(0.01)
    finally:
        tracing.install(None)
    calls = [span for span in kept.spans if span.kind is tracing.Kind.CLIENT]
    assert len(calls) == ROWS // STEP
    assert {call.parent for call in calls} == {evaluation.context}
    assert {call.traceparent for call in calls} == set(server.traces)
    told = {"server.address": "gpu", "server.port": 7405, "rpc.response.status_code": "OK"}
    assert all(told.items() <= dict(call.attributes).items() for call in calls)


def test_where_nobody_traces_servers_are_told_of_no_trace(rows):
    server = Server()
    with serving(server) as endpoints:
        evaluated(rows, fleet_of(endpoints))
    assert set(server.traces) == {None}


def die_after(count):
    def spoil(answer, context, served):
        if served > count:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the machine is gone")

    return spoil


def test_one_that_dies_in_the_middle_costs_its_batches_in_flight_and_no_more(rows):
    window = 3
    dying, good = Server(die_after(20)), Server()
    with serving(dying, good) as endpoints:
        fleet = fleet_of(endpoints, window=window)
        assert np.array_equal(evaluated(rows, fleet), expected(rows))
    assert "gone" in fleet.troubles()["s0"]
    sent = [request.id for server in (dying, good) for request in server.requests]
    assert len(set(sent)) == ROWS // STEP
    assert len(sent) - len(set(sent)) <= window


def test_one_that_hangs_in_the_middle_holds_up_nobody(rows, monkeypatch):
    monkeypatch.setattr(fleet_module, "LATE_S", 0.3)
    window, released = 3, threading.Event()

    def hang(answer, context, served):
        if served > 20:
            released.wait(60)

    hanging, good = Server(hang), Server()
    with serving(hanging, good) as endpoints:
        fleet = fleet_of(endpoints, window=window)
        began = time.monotonic()
        assert np.array_equal(evaluated(rows, fleet), expected(rows))
        assert time.monotonic() - began < 20
        released.set()
    assert "late" in fleet.troubles()["s0"]
    sent = [request.id for server in (hanging, good) for request in server.requests]
    assert len(set(sent)) == ROWS // STEP
    assert len(sent) - len(set(sent)) <= window


def test_when_all_have_died_it_says_how_each_did(rows):
    with (
        serving(Server(die_after(5)), Server(die_after(9))) as endpoints,
        pytest.raises(StreamBroken, match=r"s\d: the machine is gone; s\d: the machine is gone"),
    ):
        evaluated(rows, fleet_of(endpoints))


def busy(every, wait_s):
    def spoil(answer, context, served):
        if served % every == 0:
            error = ResourceExhausted("QUEUE_FULL", "enough waits already", retry_after_s=wait_s)
            context.set_trailing_metadata(to_rpc_status(error).trailing_metadata)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough waits already")

    return spoil


def test_a_server_that_has_too_much_to_do_is_left_alone_as_long_as_it_asks_and_is_not_lost(rows):
    server = Server(busy(every=20, wait_s=0.05))
    began = time.monotonic()
    with serving(server) as endpoints:
        fleet = fleet_of(endpoints)
        assert np.array_equal(evaluated(rows, fleet), expected(rows))
    assert fleet.troubles() == {}
    refusals = len(server.requests) // 20
    assert refusals >= 10
    # Several in flight may be refused for one pause.
    assert time.monotonic() - began >= 0.05 * refusals / WINDOW


def test_one_that_is_full_for_good_leaves_its_batches_to_the_others(rows):
    with serving(Server(busy(every=1, wait_s=30)), Server()) as endpoints:
        fleet = fleet_of(endpoints)
        began = time.monotonic()
        assert np.array_equal(evaluated(rows, fleet), expected(rows))
    assert time.monotonic() - began < 20


def busy_with(details):
    def spoil(answer, context, served):
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough waits already")

    return spoil


def retry_info(**delay):
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(**delay)))
    return status_pb2.Status(details=[packed]).SerializeToString()


@pytest.mark.parametrize("delay", [{}, {"seconds": -5}], ids=["none", "below none"])
def test_who_is_busy_and_asks_for_no_pause_gets_one(rows, delay):
    server = Server(busy_with(retry_info(**delay)))
    with serving(server) as endpoints:
        fleet = fleet_of(endpoints)
        threading.Timer(1.0, fleet.cancel).start()
        with pytest.raises(StreamCancelled):
            evaluated(rows, fleet)
    assert WINDOW < len(server.requests) <= WINDOW * (1 / fleet_module.LEAST_PAUSE_S + 2)


def test_who_is_busy_and_asks_for_an_endless_pause_is_asked_again(rows, monkeypatch):
    monkeypatch.setattr(fleet_module, "ANSWER_TIMEOUT_S", 0.2)

    def spoil(answer, context, served):
        if served == 1:
            busy_with(retry_info(seconds=300_000_000_000))(answer, context, served)

    with serving(Server(spoil)) as endpoints:
        assert np.array_equal(evaluated(rows, fleet_of(endpoints)), expected(rows))


def test_a_refusal_with_details_that_cannot_be_read_loses_its_server_at_once(rows):
    junk = any_pb2.Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff\xff\xff")
    with serving(Server(busy_with(status_pb2.Status(details=[junk]).SerializeToString()))) as endpoints:
        fleet = fleet_of(endpoints)
        threading.Timer(10.0, fleet.cancel).start()
        with pytest.raises(StreamBroken, match="enough waits already"):
            evaluated(rows, fleet)


def refuse(answer, context, served):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such input")


def many_outputs(answer, context, served):
    for _ in range(50_000):
        answer.outputs.add()


def set_shape(answer, context, served):
    answer.outputs[0].shape[1] = 3


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (refuse, RequestRefused, "no such input"),
        (set_shape, WrongAnswer, r"not FP32 of shape \[10, 2\]"),
        (many_outputs, WrongAnswer, "too many for FP32"),
    ],
)
def test_a_wrong_answer_is_named(rows, spoil, error, text):
    with serving(Server(spoil)) as endpoints, pytest.raises(error, match=text):
        evaluated(rows, fleet_of(endpoints))


def test_what_take_raises_comes_out_and_ends_the_threads(rows):
    def take(start, stop, logits):
        raise ValueError("enough")

    with serving(Server()) as endpoints, pytest.raises(ValueError, match="enough"):
        fleet_of(endpoints).run(rows, take)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fleet")]


def test_many_small_batches_are_not_listed_before_the_first(rows):
    def take(start, stop, logits):
        raise ValueError("enough")

    tracemalloc.start()
    try:
        with serving(Server()) as endpoints, pytest.raises(ValueError, match="enough"):
            fleet_of(endpoints).run(replace(rows, total=10**7 * STEP), take)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_slow_start_of_the_count_bounds_what_is_read_ahead(rows):
    server, window = Server(), 2
    seen = []

    def take(start, stop, logits):
        seen.append((start, len(server.requests)))

    with serving(server) as endpoints:
        fleet_of(endpoints, window=window).run(rows, take)
    assert all(sent * STEP <= start + 4 * window * STEP + STEP for start, sent in seen)


def test_it_can_be_cancelled_from_another_thread(rows):
    hanging, asked = threading.Event(), threading.Event()

    def hang(answer, context, served):
        asked.set()
        hanging.wait(30)

    with serving(Server(hang)) as endpoints, futures.ThreadPoolExecutor(1) as pool:
        fleet = fleet_of(endpoints)
        running = pool.submit(evaluated, rows, fleet)
        assert asked.wait(20)
        fleet.cancel()
        with pytest.raises(StreamCancelled):
            running.result(timeout=20)
        hanging.set()


@pytest.fixture
def deaf():
    """The address of a server that lets a client send without bound, and reads nothing of it."""
    settings = struct.pack(">HIHI", 4, 2**31 - 1, 5, 2**24 - 1)
    window = struct.pack(">I", 2**31 - 65_536)
    frames = [
        len(body).to_bytes(3, "big") + bytes([kind]) + bytes(5) + body for kind, body in ((4, settings), (8, window))
    ]
    with socket.socket() as listening, ExitStack() as open_connections:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve():
            with suppress(OSError):
                connection, _ = listening.accept()
                open_connections.enter_context(connection)
                connection.sendall(b"".join(frames))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_of_a_server_that_takes_nothing_no_thread_is_left(deaf, monkeypatch):
    hurried = (("grpc.keepalive_time_ms", 310_000), ("grpc.keepalive_timeout_ms", 1000))
    monkeypatch.setattr(elsewhere, "_HANG_UP", hurried)
    with connected("deaf", deaf, key=Key.generate(), audience="", credentials=None) as endpoint:
        call = endpoint.channel.unary_unary("/m", None, None).future(bytes(8 << 20))
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=0.3)
        call.cancel()
    (closing,) = (thread for thread in threading.enumerate() if thread.name == "closing-deaf")
    closing.join(timeout=20)
    assert not closing.is_alive()


def test_servers_are_named_in_the_settings():
    key = "a" * 40
    assert parse_servers(f" gpu=10.0.0.5:7405@{key}, local=unix:/run/model.sock,six=[::1]:80 ") == (
        ModelServer("gpu", "10.0.0.5:7405", key),
        ModelServer("local", "unix:/run/model.sock", tls=False),
        ModelServer("six", "[::1]:80"),
    )
    assert parse_servers(f"a=grpcs://gpu.example:7405@{key}, b=grpc://10.0.0.5:1") == (
        ModelServer("a", "gpu.example:7405", key, tls=True),
        ModelServer("b", "10.0.0.5:1", tls=False),
    )
    assert parse_servers("") == ()


@pytest.mark.parametrize(
    "text", ["10.0.0.5:7405", "gpu=host", "gpu=h:1@short", "=h:1", "a=h:1,a=h:2", "g=http://h:1", "g=grpcs://h"]
)
def test_a_server_that_is_badly_named_is_refused(text):
    with pytest.raises(ValueError, match=r"is not NAME=|one name"):
        parse_servers(text)


@pytest.mark.parametrize("later_s", [3600, -3600], ids=["after a sleep", "set back"])
def test_a_servers_token_is_of_now_also_when_the_clock_has_jumped(monkeypatch, later_s):
    key, now = Key.generate(), time.time()
    with connected("s", "127.0.0.1:1", key=key, audience="a", credentials=None) as endpoint:
        for moment in (now, now + later_s):
            monkeypatch.setattr(time, "time", lambda moment=moment: moment)
            ((_, header),) = endpoint.metadata()
            verify_token(header.removeprefix("Bearer "), audience="a", now=moment)
