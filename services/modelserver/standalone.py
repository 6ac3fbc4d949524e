"""The composition root of a model server that serves a folder of models."""

import stat
import sys
from datetime import UTC, datetime
from pathlib import Path

from services.modelserver.models import Models
from services.modelserver.running import MAX_MESSAGE_BYTES
from services.modelserver.servicer import SERVICE, mounts
from services.modelserver.settings import ModelServerSettings
from services.runtime.auth import AccessPolicy, Authenticator, Role
from services.runtime.server import run, serve
from services.runtime.telemetry import configure_telemetry
from tiltyard.identity import Key


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    settings = ModelServerSettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    run(_serve(settings))


async def _serve(settings: ModelServerSettings) -> None:
    models = _open(settings)
    await models.load_all()
    authenticator: Authenticator | None = None
    if settings.listen.startswith("unix:"):
        _private(Path(settings.listen.removeprefix("unix:")).parent)
    else:
        key = Key.load_or_create(settings.key_file, settings.key_lock)
        authenticator = Authenticator(
            audiences={key.id},
            operators=settings.operators | {key.id},
            services=settings.services,
            clock=lambda: datetime.now(UTC),
        )
    try:
        await serve(
            settings,
            mounts(models),
            name=settings.service,
            authenticator=authenticator,
            policy=AccessPolicy({f"/{SERVICE}/*": frozenset({Role.OPERATOR})}),
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
    finally:
        models.close()


def _open(settings: ModelServerSettings) -> Models:
    """The models of the settings; exit when their device is not there."""
    try:
        return Models(
            repository=settings.model_repository,
            device=settings.device,
            threads=settings.threads,
            memory_bytes=settings.model_memory_bytes,
            queue_bytes=settings.queue_bytes,
            delay_s=settings.batch_delay_ms / 1000,
        )
    except ValueError as error:
        sys.stderr.write(f"TILTYARD_DEVICE: {error}\n")
        raise SystemExit(2) from None


def _private(folder: Path) -> None:
    """Make the folder of a Unix socket for its owner alone, since nothing else guards the socket; exit if it is not."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        sys.stderr.write(f"TILTYARD_LISTEN: {folder} must be closed to others (chmod 700)\n")
        raise SystemExit(2)
