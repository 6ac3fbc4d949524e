"""What is an address of a service or an endpoint of a training node, and what is none."""

import pytest

from tiltyard.endpoints import InferenceEndpoint, check_address, parse_endpoint


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("grpc://node.example:7403", InferenceEndpoint("node.example", 7403, tls=False)),
        ("grpcs://NODE.example:1", InferenceEndpoint("node.example", 1, tls=True)),
        ("grpc://203.0.113.9:65535", InferenceEndpoint("203.0.113.9", 65535, tls=False)),
        ("grpcs://[2001:db8::1]:443", InferenceEndpoint("2001:db8::1", 443, tls=True)),
    ],
)
def test_host_port_and_whether_by_tls(text: str, endpoint: InferenceEndpoint) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "node.example:7403",
        "http://node.example:7403",
        "unix:///run/node.sock",
        "grpc://node.example",
        "grpc://node.example:0",
        "grpc://node.example:65536",
        "grpc://node.example:+1",
        "grpc://:7403",
        "grpc://node.example:7403/",
        "grpc://node.example:7403/path",
        "grpc://node.example:7403?a=b",
        "grpc://node.example:7403#a",
        "grpc://user@node.example:7403",
        "grpc://node.example:7403@127.0.0.1:1",
        "grpc://127.0.0.1,node.example:7403",
        "grpc://node .example:7403",
        "grpc://[node.example]:7403",
        "grpc://[fe80::1%25eth0]:7403",
        "grpc://2001:db8::1:443",
        "grpc://n\u00f6de.example:7403",
        f"grpc://{'a' * 250}:7403",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be grpc://HOST:PORT"):
        parse_endpoint(text)


@pytest.mark.parametrize(
    "text", ["registry:7401", "10.0.0.1:1", "[::1]:65535", "[fe80::1%eth0]:1", "unix:/run/s", "dns:///r:1"]
)
def test_an_address_stays_as_it_is(text: str) -> None:
    assert check_address(text) == text


@pytest.mark.parametrize(
    "text", ["", "unix:", "registry", "registry:http", "r:0", "r:65536", ":1", "::1:7401", "r:1\n", "http://r:1"]
)
def test_what_is_no_address_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        check_address(text)
