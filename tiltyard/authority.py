"""A certificate authority of one's own in a folder, for arenas whose services and callers all know its certificate."""

import ipaddress
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
# Clocks of machines differ.
_BACKDATED = timedelta(minutes=5)
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}\.?)+\Z")


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM files."""

    name: str
    certificate: Path
    key: Path
    hosts: tuple[str, ...]
    not_after: datetime


class Authority:
    """Signs certificates with the key in `ca.key`; whoever trusts `ca.pem` trusts them."""

    def __init__(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._folder = folder
        self._certificate = certificate
        self._key = key
        self.certificate = folder / "ca.pem"

    @classmethod
    def open(cls, folder: Path, *, now: datetime | None = None) -> "Authority":
        """The authority in `folder`, made on the first call. Raises ValueError when the files are not its own."""
        key_file, certificate_file = folder / "ca.key", folder / "ca.pem"
        if not key_file.exists() and not certificate_file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            key = ec.generate_private_key(ec.SECP256R1())
            # The key last: a folder with a key has a whole authority.
            certificate = _authority_certificate(key, now or datetime.now(UTC))
            _write(certificate_file, certificate.public_bytes(Encoding.PEM), mode=0o644)
            _write(key_file, _key_pem(key), mode=0o600)
        try:
            loaded = load_pem_private_key(key_file.read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} holds no authority: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != certificate.public_key():
            raise ValueError(f"{key_file} is not the key of {certificate_file}")
        return cls(folder, certificate, loaded)

    def has_issued(self, certificate: x509.Certificate) -> bool:
        """Whether it is of this authority; no two have one name."""
        return certificate.issuer == self._certificate.subject

    def issue(self, name: str, hosts: Iterable[str], *, days: float = 90, now: datetime | None = None) -> Issued:
        """Writes `{name}.pem` and `{name}.key`, good for `hosts` (names and addresses) as server and as client.

        Files of an earlier call are replaced, each in one step, the key first: a server that follows them takes the two
        when both are there. Raises ValueError for a host that is none.
        """
        wanted = tuple(dict.fromkeys(hosts))
        moment = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _unsigned(_name(name), self._certificate.subject, key.public_key(), moment, timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([_host(host) for host in wanted]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(
            name, self._folder / f"{name}.pem", self._folder / f"{name}.key", wanted, certificate.not_valid_after_utc
        )
        _write(issued.key, _key_pem(key), mode=0o600)
        _write(issued.certificate, certificate.public_bytes(Encoding.PEM), mode=0o644)
        return issued


def _authority_certificate(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # Two authorities must not share a subject: OpenSSL finds an issuer by it.
    name = _name(f"Tiltyard development authority {secrets.token_hex(4)}")
    return (
        _unsigned(name, name, key.public_key(), now, timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _unsigned(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def check_host(host: str) -> None:
    """Raises ValueError for what is neither a host name nor an address."""
    _host(host)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not _HOST.match(host):
            raise ValueError(f"{host!r} is neither a host name nor an address") from None
        return x509.DNSName(host)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """Puts a file in place in one step, whatever was there."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Whatever the umask: a container's user may have to read the certificate.
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
