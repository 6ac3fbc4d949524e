"""TLS of a server whose certificates are replaced while it runs: the files are looked at before each handshake."""

import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog
from cryptography import x509

from tiltyard.calls.tls import FollowedPem, Pem, PemFiles
from tiltyard.telemetry import metrics

_END = metrics.Gauge(
    "tiltyard.certificate.end.time", unit="s", description="When the certificate shown to callers ends, in Unix time."
)

_log = structlog.get_logger("tiltyard.calls.tls")


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server: certificate chain, private key, and the authority that clients' certificates come from."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files: each handshake takes those that lie there then.

        With a `client_ca` a client must show a certificate of that authority. Raises tiltyard.calls.tls.InvalidPem and
        OSError when the files can't be used now; what can't be used later leaves the earlier ones in place.
        """
        followed = FollowedPem(PemFiles(self.client_ca, self.certificate, self.key))
        # Handshakes ask from threads of gRPC's own.
        lock = threading.Lock()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            with lock:
                if not followed.changed():
                    return None
                _log.info("certificates have been replaced", certificate=str(self.certificate))
                return _configuration(followed.pem)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(followed.pem),
            fetch,  # type: ignore[arg-type]  # None, by its documentation, is no change
            require_client_authentication=self.client_ca is not None,
        )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None  # a server has both
    assert pem.certificate is not None
    _END.set(x509.load_pem_x509_certificates(pem.certificate)[0].not_valid_after_utc.timestamp())
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)
