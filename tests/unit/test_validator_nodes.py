"""Where a training node's own endpoint may lead, whatever its name resolves to."""

import asyncio
import ipaddress
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.validator.assignments import Node, Order
from services.validator.evaluation import CannotEvaluate
from services.validator.nodes import NodeEndpoints, Reach, parse_reach
from services.validator.runs import Progress
from tiltyard.identity import Key
from tiltyard.modelspec import Linear, ModelSpec

NODE = "a" * 40
ORDER = Order("d" * 64, 10, "e" * 64, 10, ModelSpec((4,), 2, Linear()), max_cpu_s=1, max_memory_bytes=1)

PUBLIC = ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.9.9.9",
    "0.0.0.0",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",  # carriers' private range
    "169.254.169.254",  # where clouds keep their secrets
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2001:0:7f00:1::",  # Teredo
    "64:ff9b::7f00:1",  # NAT64 of 127.0.0.1
    "64:ff9b::a00:1",
    "64:ff9b:1::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_the_public_internet(address: str) -> None:
    assert parse_reach("public").allows(ipaddress.ip_address(address))
    assert not Reach().allows(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_no_address_of_this_machine_or_its_networks_is_public(address: str) -> None:
    assert not parse_reach("public").allows(ipaddress.ip_address(address))


def test_networks_of_ones_own_are_named() -> None:
    reach = parse_reach("10.1.0.0/16, fd00:1::/32")
    allowed = {each for each in (*PUBLIC, *NOT_PUBLIC, "fd00:1::9") if reach.allows(ipaddress.ip_address(each))}
    assert allowed == {"10.1.2.3", "fd00:1::9"}
    assert reach.allows(ipaddress.ip_address("::ffff:10.1.0.1"))
    assert not parse_reach("").anywhere


@pytest.mark.parametrize("text", ["private", "10.0.0.1/8", "10.0.0.0/33", "public,nonsense"])
def test_what_is_no_network_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is neither 'public' nor a network"):
        parse_reach(text)


class Resolver:
    """Answers with the next list each time; the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        if not self.answers:
            raise OSError("no such host")
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    save_file({"x": np.zeros((3, 4), np.float32), "y": np.zeros(3, np.int64)}, tmp_path / "dataset")
    return tmp_path / "dataset"


async def refusal(dataset: Path, endpoint: str, resolver: Resolver, reach: str = "public") -> str:
    nodes = NodeEndpoints(parse_reach(reach), key=Key.generate(), concurrency=1, resolve=resolver)
    order = replace(ORDER, node=Node(NODE, endpoint))
    assert nodes.may_ask(order)
    with pytest.raises(CannotEvaluate) as caught:
        await nodes.evaluate(order, dataset, Progress())
    nodes.close()
    return str(caught.value)


async def test_a_name_that_leads_inside_is_not_connected_to_and_its_address_not_told(dataset: Path) -> None:
    received = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        received += 1
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for endpoint, answer in (
        (f"grpc://node.example:{port}", ["127.0.0.1"]),
        (f"grpc://node.example:{port}", ["::ffff:127.0.0.1", "10.0.0.1"]),
        (f"grpcs://localhost:{port}", ["127.0.0.1"]),
        (f"grpc://127.0.0.1:{port}", ["127.0.0.1"]),
    ):
        resolver = Resolver(answer)
        told = await refusal(dataset, endpoint, resolver)
        assert "leads where this validator does not go" in told
        assert "10.0.0.1" not in told
        assert resolver.asked[0][1] == port
    server.close()
    await server.wait_closed()
    assert received == 0


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(dataset: Path) -> None:
    connected = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    # A second look would find another address: nobody looks twice.
    resolver = Resolver(["10.0.0.1", "127.0.0.1"], ["10.0.0.1"])
    told = await refusal(dataset, f"grpc://node.example:{port}", resolver, reach="127.0.0.0/8")
    assert connected.is_set()
    assert "no model server is left" in told
    assert resolver.asked == [("node.example", port)]
    server.close()


async def test_what_has_no_address_is_said(dataset: Path) -> None:
    assert "has no address: no such host" in await refusal(dataset, "grpc://node.example:1", Resolver())
    assert "must be grpc://HOST:PORT" in await refusal(dataset, "unix:///run/node.sock", Resolver(["8.8.8.8"]))


def test_nobody_is_asked_where_task_or_operator_do_not_want_it() -> None:
    nodes = NodeEndpoints(parse_reach("public"), key=Key.generate(), concurrency=1)
    assert not nodes.may_ask(ORDER)
    nowhere = NodeEndpoints(parse_reach(""), key=Key.generate(), concurrency=1)
    assert not nowhere.may_ask(replace(ORDER, node=Node(NODE, "grpc://node.example:1")))
