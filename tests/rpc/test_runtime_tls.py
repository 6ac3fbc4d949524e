"""TLS and mutual TLS between a server and our channels."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.server import ArenaServer, ServerTls
from tiltyard.channel import ChannelTls, open_channel


class Authority:
    """A throw-away certificate authority that writes PEM files into `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = folder / f"{name}.pem"
        self.certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files of `name`, good for 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        certificate = self._builder(subject, key.public_key()).add_extension(address, critical=False)
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        paths[0].write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return paths


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "arena")


async def check(address: str, tls: ChannelTls | None) -> int:
    async with open_channel(address, tls=tls) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        status: int = answer.status
        return status


async def test_tls_needs_the_right_authority(authority: Authority, tmp_path: Path) -> None:
    tls = ServerTls(*authority.issue("server"))
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        trusted = ChannelTls(ca=authority.certificate)
        assert await check(server.address, trusted) == health_pb2.HealthCheckResponse.SERVING
        for other in (None, ChannelTls(ca=Authority(tmp_path, "other").certificate)):
            with pytest.raises(grpc.aio.AioRpcError):
                await check(server.address, other)


async def test_mutual_tls_asks_for_a_certificate_of_the_named_authority(authority: Authority, tmp_path: Path) -> None:
    tls = ServerTls(*authority.issue("server"), client_ca=authority.certificate)
    async with ArenaServer("127.0.0.1:0", [], authenticator=None, tls=tls) as server:
        certificate, key = authority.issue("client")
        known = ChannelTls(ca=authority.certificate, certificate=certificate, key=key)
        assert await check(server.address, known) == health_pb2.HealthCheckResponse.SERVING
        certificate, key = Authority(tmp_path, "other").issue("stranger")
        stranger = ChannelTls(ca=authority.certificate, certificate=certificate, key=key)
        for refused in (ChannelTls(ca=authority.certificate), stranger):
            with pytest.raises(grpc.aio.AioRpcError):
                await check(server.address, refused)
