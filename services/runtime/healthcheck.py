"""`python -m services.runtime.healthcheck`: exit status 0 if the service with this environment says SERVING, else 1.

For the health checks of containers, which start it every few seconds: it reads its few settings by itself.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 10.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104 - the key is only compared


def check(environment: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> str:
    """What the health service answers, as the name of its status; asked at TILTYARD_LISTEN, by TLS where that is set.

    Raises grpc.RpcError when nobody answers within `timeout_s` seconds, KeyError without TILTYARD_LISTEN.
    """
    host, colon, port = environment["TILTYARD_LISTEN"].rpartition(":")
    if colon and not environment["TILTYARD_LISTEN"].startswith("unix:"):
        address = f"{_EVERYWHERE.get(host, host)}:{port}"
    else:
        address = environment["TILTYARD_LISTEN"]
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    certificate = environment.get("TILTYARD_TLS_CERTIFICATE")
    if certificate:
        # Asked is this very process, by whatever name its certificate has: the certificate itself is trusted, and shown
        # to a server that wants to see one.
        chain, key = Path(certificate).read_bytes(), Path(environment["TILTYARD_TLS_KEY"]).read_bytes()
        options.append(("grpc.ssl_target_name_override", _first_name(chain)))
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(chain, key, chain), options)
    else:
        channel = grpc.insecure_channel(address, options)
    with channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return status


def _first_name(chain: bytes) -> str:
    # Plaintext is spared this import.
    from cryptography import x509

    certificate = x509.load_pem_x509_certificates(chain)[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    # It may be good for other things than hosts, too: a workload's URI, an address of e-mail.
    for name in names:
        if isinstance(name, x509.DNSName | x509.IPAddress):
            return str(name.value)
    raise ValueError("the certificate of TILTYARD_TLS_CERTIFICATE names no host (subjectAltName)")


def main() -> None:
    """Prints the status, or why there is none."""
    try:
        status = check(os.environ)
    except grpc.RpcError as error:
        status = f"no answer: {error.details() if isinstance(error, grpc.Call) else error}"
    except (KeyError, OSError, ValueError) as error:
        status = f"cannot ask: {error!r}"
    sys.stdout.write(status + "\n")
    raise SystemExit(0 if status == "SERVING" else 1)


if __name__ == "__main__":
    main()
