"""TLS and mutual TLS between a server and our channels, and certificates that are replaced while both run."""

import asyncio
import shutil
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.certificates import ServerTls
from services.runtime.server import ArenaServer
from tests.support.certificates import PrivateKey, self_signed
from tiltyard.authority import Authority, Issued
from tiltyard.calls import tls
from tiltyard.calls.channel import open_channel
from tiltyard.calls.resuming import persist
from tiltyard.calls.tls import ChannelTls, InvalidPem, PemFiles
from tiltyard.telemetry import metrics

HOSTS = ("127.0.0.1", "localhost")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "arena")


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    return Authority.open(tmp_path / "other")


def server_tls(authority: Authority, *, mutual: bool = False, name: str = "server") -> ServerTls:
    issued = authority.issue(name, HOSTS)
    return ServerTls(issued.certificate, issued.key, authority.certificate if mutual else None)


def client_tls(authority: Authority, issued: Issued | None = None) -> ChannelTls:
    if issued is None:
        return ChannelTls(authority.certificate)
    return ChannelTls(authority.certificate, issued.certificate, issued.key)


async def ask(channel: grpc.aio.Channel) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    status: int = answer.status
    return status


async def check(address: str, tls: ChannelTls | None) -> int:
    async with open_channel(address, tls=tls) as channel:
        return await ask(channel)


async def refuse(address: str, tls: ChannelTls | None) -> None:
    """One attempt that must fail, without the retries of our channels."""
    bare = grpc.aio.secure_channel(address, tls.credentials()) if tls else grpc.aio.insecure_channel(address)
    async with bare:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(bare)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def handshake(address: str, context: ssl.SSLContext) -> tuple[str | None, x509.Certificate]:
    """The TLS version agreed on, and the certificate that the server shows."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        shown = secure.getpeercert(binary_form=True)
        assert shown is not None
        return secure.version(), x509.load_der_x509_certificate(shown)


async def serial_shown(address: str, authority: Authority) -> int:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2"])
    return (await asyncio.to_thread(handshake, address, context))[1].serial_number


async def test_tls_needs_the_right_authority(authority: Authority, other: Authority) -> None:
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=server_tls(authority)) as server:
        assert await check(server.address, client_tls(authority)) == health_pb2.HealthCheckResponse.SERVING
        for wrong in (None, client_tls(other), ChannelTls()):
            await refuse(server.address, wrong)


async def test_a_certificate_for_another_host_is_refused(authority: Authority) -> None:
    issued = authority.issue("elsewhere", ["elsewhere.example.org"])
    tls = ServerTls(issued.certificate, issued.key)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        await refuse(server.address, client_tls(authority))


async def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    issued = authority.issue("old", HOSTS, days=1, now=datetime.now(UTC) - timedelta(days=2))
    tls = ServerTls(issued.certificate, issued.key)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        await refuse(server.address, client_tls(authority))


async def test_mutual_tls_asks_for_a_certificate_of_the_named_authority(authority: Authority, other: Authority) -> None:
    tls = server_tls(authority, mutual=True)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        known = client_tls(authority, authority.issue("client", HOSTS))
        assert await check(server.address, known) == health_pb2.HealthCheckResponse.SERVING
        stranger = client_tls(authority, other.issue("stranger", HOSTS))
        for refused in (client_tls(authority), stranger):
            await refuse(server.address, refused)


async def test_tls_below_1_2_is_refused_and_1_3_taken(authority: Authority) -> None:
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=server_tls(authority)) as server:
        context = ssl.create_default_context(cafile=str(authority.certificate))
        context.set_alpn_protocols(["h2"])
        assert (await asyncio.to_thread(handshake, server.address, context))[0] == "TLSv1.3"
        # What a client that knows nothing newer than TLS 1.1 sends: a record, a ClientHello, its suites, no extensions.
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        suites = bytes.fromhex("c009c00ac013c014002f0035000a")
        hello = b"\x03\x02" + bytes(32) + b"\x00" + len(suites).to_bytes(2, "big") + suites + b"\x01\x00"
        body = b"\x01" + len(hello).to_bytes(3, "big") + hello
        writer.write(b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        # Nothing, or an alert (21), fatal (2), protocol_version (70); never a ServerHello (22).
        assert answer[:1] in (b"", b"\x15"), answer
        assert answer == b"" or answer[5:7] == b"\x02\x46", answer


async def test_a_server_shows_a_replaced_certificate_without_a_restart(authority: Authority) -> None:
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=server_tls(authority)) as server:
        async with open_channel(server.address, tls=client_tls(authority)) as before:
            await ask(before)
            first = await serial_shown(server.address, authority)
            assert await serial_shown(server.address, authority) == first
            renewed = authority.issue("server", HOSTS)
            expected = x509.load_pem_x509_certificate(renewed.certificate.read_bytes()).serial_number
            assert await serial_shown(server.address, authority) == expected != first
            # What was connected before goes on, and who connects now gets through.
            await ask(before)
        await check(server.address, client_tls(authority))


async def test_the_end_of_the_certificate_is_told_and_moves_with_it(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "collecting", True)
    tls = server_tls(authority)
    (told,) = (each for each in metrics.declared() if each.name == "tiltyard.certificate.end.time")
    assert isinstance(told, metrics.Gauge)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        assert told.values() == {(): end_of(tls.certificate)}
        authority.issue("server", HOSTS, days=7)
        await serial_shown(server.address, authority)
        assert told.values() == {(): end_of(tls.certificate)}
    assert told.values()[()] < (datetime.now(UTC) + timedelta(days=8)).timestamp()


def end_of(certificate: Path) -> float:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()


async def test_a_half_replaced_pair_leaves_the_earlier_one(authority: Authority, tmp_path: Path) -> None:
    tls = server_tls(authority)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        first = await serial_shown(server.address, authority)
        renewed = authority.issue("renewed", HOSTS)
        shutil.copy(renewed.key, tls.key)
        assert await serial_shown(server.address, authority) == first
        tls.certificate.write_text("nonsense")
        assert await serial_shown(server.address, authority) == first
        tls.certificate.unlink()
        assert await serial_shown(server.address, authority) == first
        shutil.copy(renewed.certificate, tls.certificate)
        assert await serial_shown(server.address, authority) != first


async def test_the_clients_authority_is_replaced_without_a_restart(authority: Authority, other: Authority) -> None:
    tls = server_tls(authority, mutual=True)
    assert tls.client_ca is not None
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        new_client = client_tls(authority, other.issue("new", HOSTS))
        await refuse(server.address, new_client)
        # Old and new side by side while clients change over. The file is the client's, too, here: it trusts both.
        tls.client_ca.write_bytes(tls.client_ca.read_bytes() + other.certificate.read_bytes())
        assert await check(server.address, new_client) == health_pb2.HealthCheckResponse.SERVING


async def test_an_open_channel_follows_its_certificate_and_authority(
    authority: Authority, other: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_LOOK_EVERY_S", 0.0)
    ours = authority.issue("client", HOSTS)
    ca = tmp_path / "trusted.pem"
    shutil.copy(authority.certificate, ca)
    channel_tls = ChannelTls(ca, ours.certificate, ours.key)
    first = ArenaServer("127.0.0.1:0", [], authenticator=None, tls=server_tls(authority, mutual=True))
    async with first, open_channel(first.address, tls=channel_tls) as channel:
        await ask(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        # The whole arena moves to another authority: first the client's files, then the server.
        theirs = other.issue("client", HOSTS)
        for old, new in ((ours.key, theirs.key), (ours.certificate, theirs.certificate), (ca, other.certificate)):
            shutil.copy(new, old)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel)
        # A call that began before goes on over the earlier connection.
        await first.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        port = first.port
        await first.stop(grace_s=0)
        second = ArenaServer(f"127.0.0.1:{port}", [], authenticator=None, tls=server_tls(other, mutual=True))
        async with second:
            serving = await persist(lambda: ask(channel), patience_s=20)
            assert serving == health_pb2.HealthCheckResponse.SERVING


async def test_an_authority_that_is_cut_off_leaves_the_earlier_ones(
    authority: Authority, other: Authority, tmp_path: Path
) -> None:
    trusted = tmp_path / "trusted.pem"
    both = other.certificate.read_bytes() + authority.certificate.read_bytes()
    trusted.write_bytes(both)
    issued = authority.issue("server", HOSTS)
    tls = ServerTls(issued.certificate, issued.key, trusted)
    known = client_tls(authority, authority.issue("known", HOSTS))
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        trusted.write_bytes(both[:-40])
        assert await check(server.address, known)
    with pytest.raises(InvalidPem, match=r"trusted.pem ends within a certificate"):
        tls.credentials()


@pytest.mark.parametrize("broken", ["key of another", "no certificate", "no key", "only a key", "no authority"])
def test_files_that_do_not_fit_are_named(authority: Authority, tmp_path: Path, broken: str) -> None:
    good, nonsense = authority.issue("good", HOSTS), tmp_path / "nonsense.pem"
    nonsense.write_text("hello")
    files, culprit = {
        "key of another": (PemFiles(None, good.certificate, authority.issue("b", HOSTS).key), "b.key"),
        "no certificate": (PemFiles(None, nonsense, good.key), "nonsense.pem"),
        "no key": (PemFiles(None, good.certificate, nonsense), "nonsense.pem"),
        "only a key": (PemFiles(None, None, good.key), "good.key"),
        "no authority": (PemFiles(nonsense), "nonsense.pem"),
    }[broken]
    with pytest.raises(InvalidPem, match=culprit):
        files.read()


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())])
def test_a_key_that_grpc_would_end_each_handshake_for_is_refused_at_once(tmp_path: Path, key: PrivateKey) -> None:
    certificate, key_file = self_signed(tmp_path, key, [x509.DNSName("localhost")])
    with pytest.raises(InvalidPem, match=r"self.pem: gRPC takes certificates with keys of RSA, P-256 and P-384 alone"):
        PemFiles(None, certificate, key_file).read()
