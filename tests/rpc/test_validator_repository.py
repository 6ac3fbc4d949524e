"""Models loaded on several servers: one that hangs, is full or is away leaves the evaluation to the others."""

import threading
import time
from concurrent import futures
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from services.runtime.errors import ResourceExhausted
from services.runtime.rpc_errors import to_rpc_status
from services.validator import repository
from services.validator.evaluation import CannotEvaluate, ServerLost
from services.validator.fleet import Endpoint
from services.validator.repository import Loads, unload
from tiltyard.inference.v2 import inference_pb2 as pb
from tiltyard.inference.v2 import inference_pb2_grpc as rpc


class Server(rpc.GRPCInferenceServiceServicer):
    """Loads at once, unless `spoil` does something else; knows what it holds."""

    def __init__(self, spoil=None):
        self.asked = 0
        self.held = set()
        self._spoil = spoil

    def RepositoryModelLoad(self, request, context):
        self.asked += 1
        if self._spoil:
            self._spoil(self, context)
        self.held.add(request.model_name)
        return pb.RepositoryModelLoadResponse()

    def RepositoryModelUnload(self, request, context):
        if request.model_name not in self.held:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        self.held.discard(request.model_name)
        return pb.RepositoryModelUnloadResponse()


@contextmanager
def serving(*servers):
    """Endpoints of the servers; None is an address where nobody listens."""
    with ExitStack() as stack:
        endpoints = []
        for index, server in enumerate(servers):
            running = grpc.server(futures.ThreadPoolExecutor(4))
            port = running.add_insecure_port("127.0.0.1:0")
            if server is not None:
                rpc.add_GRPCInferenceServiceServicer_to_server(server, running)
            running.start()
            if server is None:
                running.stop(0).wait()
            else:
                stack.callback(lambda running=running: running.stop(0).wait())
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
            endpoints.append(Endpoint(f"s{index}", channel, tuple))
        yield endpoints


def names(endpoints):
    return [endpoint.name for endpoint in endpoints]


def refuse(server, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such platform")


def full(server, context):
    error = ResourceExhausted("NO_ROOM", "full of others' models", retry_after_s=0.05)
    context.set_trailing_metadata(to_rpc_status(error).trailing_metadata)
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full of others' models")


def full_twice(server, context):
    if server.asked <= 2:
        full(server, context)


def test_all_load_and_let_go():
    servers = [Server(), Server(full_twice)]
    with serving(*servers) as endpoints:
        assert Loads(endpoints, "m").run() == endpoints
        assert [server.held for server in servers] == [{"m"}, {"m"}]
        unload(endpoints, "m")
    assert [server.held for server in servers] == [set(), set()]


def test_one_that_hangs_or_stays_full_or_refuses_or_is_away_is_left_out(monkeypatch):
    monkeypatch.setattr(repository, "LATE_S", 0.5)
    released = threading.Event()
    hanging, good = Server(lambda server, context: released.wait(60)), Server()
    with serving(hanging, Server(full), Server(refuse), None, good) as endpoints:
        began = time.monotonic()
        assert names(Loads(endpoints, "m").run()) == ["s4"]
        assert time.monotonic() - began < 20
        released.set()


def test_a_slow_one_is_waited_for_where_it_is_the_only_one(monkeypatch):
    monkeypatch.setattr(repository, "LATE_S", 0.0)
    server = Server(full_twice)
    with serving(server) as endpoints:
        assert names(Loads(endpoints, "m").run()) == ["s0"]
    assert server.asked == 3


def test_when_nobody_loads_it_is_told_why():
    with serving(None, None) as endpoints, pytest.raises(ServerLost, match=r"s0: .*; s1: "):
        Loads(endpoints, "m").run()
    with serving(None, Server(refuse)) as endpoints, pytest.raises(CannotEvaluate, match="s1: no such platform"):
        Loads(endpoints, "m").run()


def test_who_gives_up_a_load_waits_for_no_server():
    asked, released = threading.Event(), threading.Event()

    def hang(server, context):
        asked.set()
        released.wait(60)

    with serving(Server(hang), Server(hang)) as endpoints, futures.ThreadPoolExecutor(1) as threads:
        loads = Loads(endpoints, "m")
        running = threads.submit(loads.run)
        assert asked.wait(60)
        loads.give_up()
        with pytest.raises(CannotEvaluate, match="nobody waits for it"):
            running.result(timeout=20)
        released.set()
