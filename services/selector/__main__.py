"""`python -m services.selector`: the selector in a process of its own."""

from services.runtime.server import run, serve
from services.runtime.telemetry import configure_telemetry
from services.selector.bootstrap import build
from services.selector.settings import SelectorSettings


async def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = SelectorSettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    selector = await build(settings)
    await serve(
        settings,
        selector.mounts,
        name=settings.service,
        authenticator=selector.authenticator,
        policy=selector.policy,
        remembered=selector.database,
        on_close=[selector.close],
    )


if __name__ == "__main__":
    run(main())
