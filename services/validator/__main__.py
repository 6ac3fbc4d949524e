"""The composition root of a validator: `python -m services.validator`."""

import signal

from services.runtime.server import run, serve
from services.runtime.telemetry import configure_telemetry
from services.validator.bootstrap import build
from services.validator.settings import ValidatorSettings


async def _serve(settings: ValidatorSettings) -> None:
    # A drain ends like any other stop: health first, then calls in flight.
    validator = await build(settings, on_drained=lambda: signal.raise_signal(signal.SIGTERM))
    await serve(
        settings,
        validator.mounts,
        name=settings.service,
        authenticator=validator.authenticator,
        policy=validator.policy,
        remembered=validator.database,
        background=validator.background,
        on_close=validator.on_close,
    )


def main() -> None:
    """Serves until SIGTERM, SIGINT or the end of a drain."""
    settings = ValidatorSettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    run(_serve(settings))


if __name__ == "__main__":
    main()
