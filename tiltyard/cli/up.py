"""`tiltyard up`: one of each service on this machine."""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import DEFAULT_ORIGIN, CommandError, OriginOption, fail, key_lock, run
from tiltyard.cli.service_settings import DECIDED, asked_for

if TYPE_CHECKING:
    from tiltyard.cli.supervisor import Program, Supervisor
    from tiltyard.keyfiles import KeyLock

SERVICES = ("registry", "selector", "trainer", "validator")
DATA_FOLDER = "data"


def arena_programs(
    supervisor: "Supervisor",
    *,
    registry_port: int,
    selector_port: int,
    operator: str,
    origin: str,
    lock: "KeyLock | None" = None,
    settings: "dict[str, str] | None" = None,
) -> "list[Program]":
    """Registry and selector that know each other by address and key; `operator` is a participant id."""
    from tiltyard.cli.supervisor import Program
    from tiltyard.identity import Key
    from tiltyard.keyfiles import KeyLock

    registry_key = Key.load_or_create(supervisor.folder("registry") / "key.pem", lock or KeyLock())
    Key.load_or_create(supervisor.folder("selector") / "key.pem", lock or KeyLock())
    shared = {"ORIGIN": origin, "OPERATORS": operator, **(settings or {})}
    selector = Program("selector", "services.selector", selector_port, {**shared, "SERVICES": registry_key.id})
    registry = Program("registry", "services.registry", registry_port, {**shared, "SELECTOR": selector.address})
    return [registry, selector]


def node_program(
    supervisor: "Supervisor",
    name: str,
    *,
    kind: str,
    port: int,
    registry: str,
    operator: str,
    origin: str,
    lock: "KeyLock | None" = None,
    settings: "dict[str, str] | None" = None,
) -> "Program":
    """A trainer or validator (`kind`) with a key of its own."""
    from tiltyard.cli.supervisor import Program
    from tiltyard.identity import Key
    from tiltyard.keyfiles import KeyLock

    folder = supervisor.folder(name)
    Key.load_or_create(folder / "key.pem", lock or KeyLock())
    known = {"ORIGIN": origin, "OPERATORS": operator, "REGISTRY": registry, **(settings or {})}
    if kind == "trainer":
        data = folder / DATA_FOLDER
        data.mkdir(parents=True, exist_ok=True)
        known["DATA_DIR"] = str(data)
    return Program(name, f"services.{kind}", port, known, may_end=kind == "validator")


def up(
    state: Annotated[Path, typer.Option(help="Folder of all durable state; keys are made in it.")] = Path(
        "tiltyard-state"
    ),
    port_base: Annotated[
        int,
        typer.Option(min=0, max=65000, help="Ports are this plus 1 to 4 in the order of the ready line; 0: free ones."),
    ] = 7400,
    origin: OriginOption = DEFAULT_ORIGIN,
) -> None:
    """Run one of each service until interrupted.

    What dies is started again. They serve plaintext, on this machine's loopback interface only. The settings of a
    service that are set for this command, as TILTYARD_LOG_LEVEL, are handed on to it.
    """
    refuse_set("up", DECIDED)
    run(_up(state.absolute(), port_base, origin))


async def _up(state: Path, port_base: int, origin: str) -> None:
    from tiltyard.cli.supervisor import free_ports, is_free

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    ports = [port_base + n for n in range(1, 5)] if port_base else free_ports(4)
    taken = [port for port in ports if not is_free(port)]
    if taken:
        raise CommandError(f"port {taken[0]} is taken; choose another --port-base, or 0 for free ports")
    lock, settings = key_lock(), lock_settings()
    with _owned(state):
        await _run_services(state, ports, origin, lock, settings, stop)


async def _run_services(
    state: Path, ports: list[int], origin: str, lock: "KeyLock", settings: dict[str, str], stop: asyncio.Event
) -> None:
    from tiltyard.cli.supervisor import StartFailed, Supervisor
    from tiltyard.identity import Key

    operator = await asyncio.to_thread(Key.load_or_create, state / "operator.pem", lock)
    async with Supervisor(state, report=_report) as supervisor:
        registry, selector = arena_programs(
            supervisor,
            registry_port=ports[0],
            selector_port=ports[1],
            operator=operator.id,
            origin=origin,
            lock=lock,
            settings=settings,
        )
        nodes = [
            node_program(
                supervisor,
                kind,
                kind=kind,
                port=port,
                registry=registry.address,
                operator=operator.id,
                origin=origin,
                lock=lock,
                settings=settings,
            )
            for kind, port in zip(("trainer", "validator"), ports[2:], strict=True)
        ]
        programs = [
            replace(each, settings={**each.settings, **asked_for(each.name, os.environ)})
            for each in (registry, selector, *nodes)
        ]
        await supervisor.start(programs)
        serving = asyncio.create_task(supervisor.until_serving())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        try:
            if serving.done():
                serving.result()
                print("ready", *(f"{each.name}={each.address}" for each in programs), flush=True)
                _report(f"state, keys and logs lie in {state}; stop with Ctrl-C or SIGTERM to {os.getpid()}")
                await stopped
        except StartFailed as error:
            what, _, log = str(error).partition("\n")
            if log:
                _report(log)
            raise CommandError(what) from None
        finally:
            serving.cancel()
            stopped.cancel()
        _report("draining")


@contextlib.contextmanager
def _owned(state: Path) -> Iterator[None]:
    """Holds the state folder for this process; the kernel lets go of it however the process ends."""
    # What validators have sealed and nobody may see yet lies in it, and hidden datasets.
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{state} can't be made: {error.strerror}", param_hint="--state") from None
    with (state / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(f"{state} is in use by another `tiltyard up`; choose another --state") from None
        yield


def refuse_set(command: str, decided: Mapping[str, str]) -> None:
    """Ends the command where TLS is asked for, or what is `decided` here: settings without the prefix, and how.

    Whoever asks for TLS gets no plaintext; nor would their commands, which heed it, reach these services. Whoever sets
    what is decided here gets something else, and would not notice.
    """
    asked = sorted(name for name, value in os.environ.items() if name.startswith("TILTYARD_TLS_") and value)
    if asked:
        fail(
            f"{asked[0]} is set, but `tiltyard {command}` serves plaintext, on loopback only: "
            f"unset {', '.join(asked)}, or run each service by itself (docs/howto/tls.md)"
        )
    for name, how in decided.items():
        if os.environ.get(f"TILTYARD_{name}"):
            fail(
                f"TILTYARD_{name} is set, but `tiltyard {command}` sees to that itself, {how}: unset it, "
                "or run each service by itself"
            )


def lock_settings() -> dict[str, str]:
    """What the services are told of their keys' encryption: the same as this command."""
    told = {}
    if file := os.environ.get("TILTYARD_KEY_PASSPHRASE_FILE"):
        told["KEY_PASSPHRASE_FILE"] = os.path.abspath(file)
    if required := os.environ.get("TILTYARD_KEY_ENCRYPTION_REQUIRED"):
        told["KEY_ENCRYPTION_REQUIRED"] = required
    return told


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
