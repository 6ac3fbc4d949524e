"""`python -m services.registry`: the registry in a process of its own."""

from services.registry.bootstrap import build
from services.registry.domain_metrics import DomainMetrics
from services.registry.settings import RegistrySettings
from services.runtime.server import run, serve
from services.runtime.standby import ActiveRole
from services.runtime.state_folder import make_state_folder
from services.runtime.telemetry import configure_telemetry


async def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = RegistrySettings.load()
    configure_telemetry(settings.service, settings.log_level, settings.log_format)
    make_state_folder(settings.state_dir)
    # Of several processes on one database the first serves, the others wait to take over.
    async with ActiveRole(settings.database_url, settings.service):
        registry = await build(settings)
        await registry.begin()
        await serve(
            settings,
            registry.mounts,
            name=settings.service,
            authenticator=registry.authenticator,
            policy=registry.policy,
            remembered=registry.database,
            background=[
                registry.outages.watch,
                registry.referee.run,
                registry.garbage.run,
                DomainMetrics(registry.database).run,
            ],
            on_close=[registry.close],
        )


if __name__ == "__main__":
    run(main())
