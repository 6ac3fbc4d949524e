"""`python -m services.selector`: the selector in a process of its own."""

from services.runtime.server import run, serve
from services.runtime.state_folder import make_state_folder
from services.runtime.telemetry import configure_telemetry
from services.selector.bootstrap import build
from services.selector.settings import SelectorSettings

# Draws go from the loop to the signer, to the writer and back. Whoever comes back from signing or syncing waits for the
# interpreter's lock as long as this, where the default of 5 ms is the time of several draws. With 0.1 ms, in turns on a
# busy machine, there were a fifth fewer draws.
_SWITCH_S = 0.0005


async def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = SelectorSettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    make_state_folder(settings.state_dir)
    selector = await build(settings)
    await serve(
        settings,
        selector.mounts,
        name=settings.service,
        authenticator=selector.authenticator,
        policy=selector.policy,
        remembered=selector.database,
        on_close=[selector.close],
        switch_s=_SWITCH_S,
    )


if __name__ == "__main__":
    run(main())
