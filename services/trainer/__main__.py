"""`python -m services.trainer`: a training node in a process of its own."""

from services.runtime.server import run, serve
from services.runtime.state_folder import own_state_folder
from services.runtime.telemetry import configure_telemetry
from services.trainer.bootstrap import build
from services.trainer.servicers.inference import MAX_MESSAGE_BYTES
from services.trainer.settings import TrainerSettings


async def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = TrainerSettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    # Another would take the trainings that run here for left over, and run them beside.
    own_state_folder(settings.state_dir, settings.service)
    trainer = await build(settings)
    await serve(
        settings,
        trainer.mounts,
        name=settings.service,
        authenticator=trainer.authenticator,
        policy=trainer.policy,
        remembered=trainer.database,
        background=trainer.background,
        on_close=trainer.on_close,
        max_message_bytes=MAX_MESSAGE_BYTES,
    )


if __name__ == "__main__":
    run(main())
