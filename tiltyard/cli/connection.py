"""What commands share to reach an arena: the options that say where and who, and one way to run and to fail."""

import asyncio
import getpass
import os
import re
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from tiltyard.calls.tls import ChannelTls
    from tiltyard.client import Client, Node
    from tiltyard.identity import Key
    from tiltyard.keyfiles import KeyLock

T = TypeVar("T")

DEFAULT_ORIGIN = "tiltyard.local"


def _checked(address: str) -> str:
    from tiltyard.endpoints import check_address

    try:
        return check_address(address)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


KeyOption = Annotated[Path, typer.Option("--key", envvar="TILTYARD_KEY", help="File of the key that acts.")]
OriginOption = Annotated[str, typer.Option("--origin", envvar="TILTYARD_ORIGIN", help="The arena's name.")]
RegistryOption = Annotated[
    str, typer.Option("--registry", envvar="TILTYARD_REGISTRY", callback=_checked, help="HOST:PORT of the registry.")
]
SelectorOption = Annotated[
    str, typer.Option("--selector", envvar="TILTYARD_SELECTOR", callback=_checked, help="HOST:PORT of the selector.")
]
TrainerOption = Annotated[
    str, typer.Option("--trainer", envvar="TILTYARD_TRAINER", callback=_checked, help="HOST:PORT of a trainer.")
]
ValidatorOption = Annotated[
    str, typer.Option("--validator", envvar="TILTYARD_VALIDATOR", callback=_checked, help="HOST:PORT of a validator.")
]
NodeOption = Annotated[str, typer.Option("--node", help="Participant id of the node, where it is not the key's own.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
FilterOption = Annotated[
    str,
    typer.Option("--filter", help='Terms as "state = OPEN" joined by AND; docs/reference names fields and operators.'),
]
OrderOption = Annotated[str, typer.Option("--order-by", help='A field, with "desc" behind it for the reverse.')]
ModelIndexOption = Annotated[
    int, typer.Option("--model-index", min=0, max=65536, help="Which of the task's models, counted from 0.")
]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="tasks/{task}, or the last part of it.")]
TaskOption = Annotated[str, typer.Option("--task", metavar="TASK", help="tasks/{task}, or the last part of it.")]

REGISTRY = "127.0.0.1:7401"
SELECTOR = "127.0.0.1:7402"
TRAINER = "127.0.0.1:7403"
VALIDATOR = "127.0.0.1:7404"
"""Where `tiltyard up` puts them by default."""

_FOR_ANOTHER_NODE = re.compile(r"the token is for another audience, '[0-9a-f]{40}', not '[0-9a-f]{40}'")
_OF_ANOTHER_TIME = re.compile(r"the token (has expired|was issued in the future)")
_ENDED = ("Socket closed", "Connection reset", "Broken pipe")


class CommandError(Exception):
    """What a command refuses, in one line for the person who typed it."""


def fail(problem: str | Exception) -> NoReturn:
    """Ends the command with one line on standard error and status 1."""
    print(f"error: {in_words(problem)}", file=sys.stderr)
    raise typer.Exit(1)


def in_words(problem: str | Exception) -> str:
    """What went wrong; of a file its name comes first, and no number of the system's."""
    if isinstance(problem, OSError) and problem.filename is not None and problem.strerror:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem)


def key_lock() -> "KeyLock":
    """How keys lie on disk by TILTYARD_KEY_PASSPHRASE_FILE and TILTYARD_KEY_ENCRYPTION_REQUIRED, as for a service."""
    from tiltyard.keyfiles import KeyLock

    file = os.environ.get("TILTYARD_KEY_PASSPHRASE_FILE", "")
    required = os.environ.get("TILTYARD_KEY_ENCRYPTION_REQUIRED", "").lower() in ("1", "true", "yes", "on")
    try:
        return KeyLock.read(Path(file) if file else None, required=required)
    except (ValueError, OSError) as error:
        raise CommandError(f"TILTYARD_KEY_PASSPHRASE_FILE: {in_words(error)}") from None


def load_key(path: Path) -> "Key":
    """The key in a file; asks for its passphrase on a terminal. Raises CommandError that says how to make one."""
    from tiltyard.identity import Key, LockedKey
    from tiltyard.keyfiles import KeyLock

    lock = key_lock()
    try:
        try:
            return Key.load(path, lock)
        except LockedKey as locked:
            if not sys.stdin.isatty():
                raise CommandError(f"{locked}: name a file in TILTYARD_KEY_PASSPHRASE_FILE") from None
            passphrase = getpass.getpass(f"passphrase of {path}: ").encode()
            return Key.load(path, KeyLock(passphrase, lock.required))
    except FileNotFoundError:
        raise CommandError(f"there is no key in {path}; `tiltyard key new {path}` makes one") from None
    except (OSError, ValueError) as error:
        raise CommandError(in_words(error)) from None


def tls_of_environment() -> "ChannelTls | None":
    """TLS by TILTYARD_TLS_CA, TILTYARD_TLS_CERTIFICATE and TILTYARD_TLS_KEY, as for a service; None for plaintext."""
    ca, *own = (os.environ.get(f"TILTYARD_TLS_{name}", "") for name in ("CA", "CERTIFICATE", "KEY"))
    if not ca:
        return None
    from tiltyard.calls.tls import ChannelTls, InvalidPem

    certificate, key = (Path(file) if file else None for file in own)
    tls = ChannelTls.of(ca, certificate, key)
    try:
        if tls is not None:
            tls.files.read()
    except (InvalidPem, OSError) as error:
        raise CommandError(f"TILTYARD_TLS_*: {in_words(error)}") from None
    return tls


def connect(key: Path, origin: str, registry: str = "", selector: str = "") -> "Client":
    """A client for one command, to be used with `async with`."""
    from tiltyard.client import Client

    return Client(load_key(key), origin=origin, registry=registry, selector=selector, tls=tls_of_environment())


def connect_node(key: Path, address: str, node: str = "") -> "Node":
    """A client of a trainer or validator, to be used with `async with`; `node` is its id where the key is another's."""
    from tiltyard.client import Node

    loaded = load_key(key)
    node_id = node.removeprefix("participants/") or loaded.id
    return Node(loaded, address=address, node_id=node_id, tls=tls_of_environment())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command to its end. What went wrong becomes one line on standard error and status 1.

    Where the OTEL_* variables ask for it, all that follows from the command is one trace.
    """
    try:
        return _run(work)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        work.close()  # an interrupt may have come before it began


def _run(work: Coroutine[Any, Any, T]) -> T:
    from tiltyard import telemetry

    try:
        telemetry.start("cli")
        return asyncio.run(_traced(work))
    except BrokenPipeError:
        raise  # whoever read the output has seen enough, as `head` has: click ends without a word
    except UnicodeEncodeError as error:
        # An argument may hold any bytes, and a file's name may too; no call takes them.
        raise typer.BadParameter(f"{error.object!r} is not UTF-8") from None
    except OSError as error:
        fail(error)
    except Exception as error:
        if not isinstance(error, _foreseen()):
            raise
        from tiltyard.calls.errors import explain

        fail(with_hint(explain(error)))


def _foreseen() -> tuple[type[Exception], ...]:
    """What may go wrong with a command. Asked for once something has: few commands import all of this themselves."""
    import grpc

    from tiltyard.audit.record import InvalidRecord
    from tiltyard.calls.errors import ClientError
    from tiltyard.datasources import DatasetError
    from tiltyard.statements import InvalidSignature
    from tiltyard.submitting import JournalMismatch
    from tiltyard.transfers import DigestMismatch
    from tiltyard.transparency import InvalidNote

    return (
        CommandError,
        grpc.aio.AioRpcError,
        ClientError,
        DatasetError,
        InvalidNote,
        InvalidRecord,
        InvalidSignature,
        JournalMismatch,
        DigestMismatch,
    )


def with_hint(line: str) -> str:
    """What went wrong, with what may be behind it where the answer alone does not tell.

    A server ends the connection without a word when it hears plaintext where it wants TLS, or misses a certificate:
    gRPC tells of neither. A token for another node is one that names the key's own id. A command makes its tokens
    anew: none is old but by the clock.
    """
    if _OF_ANOTHER_TIME.search(line):
        return f"{line} (this machine's clock says {datetime.now(UTC):%F %T} UTC, the service's says something else)"
    if _FOR_ANOTHER_NODE.search(line):
        return f"{line} (where the key is not the node's own, --node names the node's id)"
    if not line.startswith("the service cannot be reached") or not any(each in line for each in _ENDED):
        return line
    if os.environ.get("TILTYARD_TLS_CA"):
        return f"{line} (if it asks for a certificate: TILTYARD_TLS_CERTIFICATE and TILTYARD_TLS_KEY name yours)"
    return f"{line} (if it speaks TLS: TILTYARD_TLS_CA names its authority)"


async def _traced(work: Coroutine[Any, Any, T]) -> T:
    from tiltyard.telemetry import tracing

    # `train.<locals>.work` is what `tiltyard train` does.
    command = getattr(work, "__qualname__", "").partition(".")[0].strip("_").lower()
    with tracing.span(f"tiltyard {command}"):
        return await work


def task_name(text: str) -> str:
    """tasks/{task} from that or from its last part."""
    return text if text.startswith("tasks/") else f"tasks/{text}"


def participant_name(text: str) -> str:
    """participants/{id} from that or from the id."""
    return text if text.startswith("participants/") else f"participants/{text}"
