"""The health check of the containers, against real servers."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from services.runtime.healthcheck import check
from services.runtime.server import ArenaServer, ServerTls
from tests.support.certificates import self_signed
from tiltyard.authority import Authority


async def test_asks_at_the_address_that_the_service_listens_on() -> None:
    server = ArenaServer("127.0.0.1:0", [], authenticator=None)
    async with server:
        for host in ("127.0.0.1", "0.0.0.0"):
            environment = {"TILTYARD_LISTEN": f"{host}:{server.port}"}
            assert await asyncio.to_thread(check, environment) == "SERVING"
        await server.set_serving(False)
        assert await asyncio.to_thread(check, environment) == "NOT_SERVING"


async def test_asks_on_a_unix_socket(tmp_path: Path) -> None:
    async with ArenaServer(f"unix:{tmp_path}/server.sock", [], authenticator=None) as server:
        assert await asyncio.to_thread(check, {"TILTYARD_LISTEN": server.address}) == "SERVING"


@pytest.mark.parametrize("mutual", [False, True])
async def test_trusts_and_shows_the_service_s_own_certificate(tmp_path: Path, mutual: bool) -> None:
    authority = Authority.open(tmp_path / "authority")
    issued = authority.issue("registry", ["registry", "localhost"])
    tls = ServerTls(issued.certificate, issued.key, authority.certificate if mutual else None)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        environment = {
            "TILTYARD_LISTEN": f"127.0.0.1:{server.port}",
            "TILTYARD_TLS_CERTIFICATE": str(issued.certificate),
            "TILTYARD_TLS_KEY": str(issued.key),
        }
        assert await asyncio.to_thread(check, environment) == "SERVING"
        other = Authority.open(tmp_path / "another").issue("stranger", ["localhost"])
        environment |= {"TILTYARD_TLS_CERTIFICATE": str(other.certificate), "TILTYARD_TLS_KEY": str(other.key)}
        with pytest.raises(grpc.RpcError):
            await asyncio.to_thread(check, environment)


async def test_asks_by_the_first_host_that_the_certificate_names(tmp_path: Path) -> None:
    names = [x509.UniformResourceIdentifier("spiffe://arena/registry"), x509.DNSName("registry")]
    certificate, key = self_signed(tmp_path, ec.generate_private_key(ec.SECP256R1()), names)
    tls = ServerTls(certificate, key)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        environment = {
            "TILTYARD_LISTEN": f"127.0.0.1:{server.port}",
            "TILTYARD_TLS_CERTIFICATE": str(certificate),
            "TILTYARD_TLS_KEY": str(key),
        }
        assert await asyncio.to_thread(check, environment) == "SERVING"
        self_signed(tmp_path, ec.generate_private_key(ec.SECP256R1()), [])
        with pytest.raises(ValueError, match="names no host"):
            await asyncio.to_thread(check, environment)


@pytest.mark.parametrize(
    ("environment", "says"),
    [({"TILTYARD_LISTEN": "127.0.0.1:1"}, "no answer"), ({}, "cannot ask: KeyError('TILTYARD_LISTEN')")],
)
def test_fails_and_says_why(environment: dict[str, str], says: str) -> None:
    command = [sys.executable, "-m", "services.runtime.healthcheck"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert says in ended.stdout
    assert ended.stderr == ""
