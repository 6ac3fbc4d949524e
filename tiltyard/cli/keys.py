"""`tiltyard key`, `token` and `sign`: keys, and what they prove to a server or to everyone."""

import getpass
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import (
    DEFAULT_ORIGIN,
    CommandError,
    JsonOption,
    KeyOption,
    OriginOption,
    fail,
    key_lock,
    load_key,
)
from tiltyard.cli.key_copies import check_is_copy, id_of, key_copy, load_any_key, public_key_of, read_key_copy
from tiltyard.cli.output import as_json, print_json

if TYPE_CHECKING:
    from tiltyard.cli.key_copies import AnyKey
    from tiltyard.identity import Key

_PARTICIPANT_ID = re.compile(r"[0-9a-f]{40}")

PassphraseOption = Annotated[
    Path | None, typer.Option(help="A file whose first line is the passphrase, instead of typing it.")
]

app = typer.Typer(help="Make, show and copy keys.", no_args_is_help=True)


def _load(path: Path) -> "Key":
    try:
        return load_key(path)
    except CommandError as error:
        fail(error)


def _print(key: "AnyKey", path: Path, json: bool) -> None:
    public_key = public_key_of(key).hex()
    if json:
        print_json({"id": id_of(key), "public_key": public_key, "file": str(path)})
    else:
        print(f"id          {id_of(key)}\npublic key  {public_key}")


def _new_passphrase(file: Path | None, what: str) -> bytes:
    """A passphrase to encrypt with: the first line of `file`, or typed twice on a terminal."""
    from tiltyard.keyfiles import KeyLock

    if file is not None:
        passphrase = KeyLock.read(file).passphrase
        assert passphrase is not None  # a file always holds one
        return passphrase
    if not sys.stdin.isatty():
        raise CommandError(f"{what} needs a passphrase: name a file that holds it with --passphrase-file")
    passphrase = getpass.getpass(f"passphrase for {what}: ").encode()
    if not passphrase:
        raise CommandError("an empty passphrase protects nothing")
    if getpass.getpass("the same again: ").encode() != passphrase:
        raise CommandError("the two are not the same")
    return passphrase


@app.command("new")
def new(
    file: Path,
    encrypt: Annotated[bool, typer.Option("--encrypt", help="Encrypt it under a passphrase.")] = False,
    passphrase_file: PassphraseOption = None,
    json: JsonOption = False,
) -> None:
    """Make a new Ed25519 key in FILE; never overwrites.

    PKCS #8 PEM, readable by you alone.

    It is encrypted with --encrypt, with --passphrase-file, and where TILTYARD_KEY_PASSPHRASE_FILE is set.
    """
    from tiltyard.identity import Key
    from tiltyard.keyfiles import KeyLock

    try:
        lock = key_lock()
        if encrypt or passphrase_file is not None:
            lock = KeyLock(_new_passphrase(passphrase_file, str(file)), lock.required)
        key = Key.generate()
        key.save(file, lock)
    except FileExistsError:
        fail(f"{file} is there already")
    except (OSError, ValueError, CommandError) as error:
        fail(error)
    _print(key, file, json)


@app.command("id")
def id_(file: Path) -> None:
    """Print the participant id of the key in FILE and nothing else."""
    print(_load(file).id)


@app.command("show")
def show(file: Path, json: JsonOption = False) -> None:
    """Print id and public key of the key in FILE.

    The selector's BLS key has no other id than its public key.
    """
    try:
        _print(load_any_key(file), file, json)
    except CommandError as error:
        fail(str(error))


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The key.")],
    copy: Annotated[Path, typer.Argument(metavar="COPY", help="Where the copy goes; never overwritten.")],
    passphrase_file: PassphraseOption = None,
    json: JsonOption = False,
) -> None:
    """Write an encrypted copy of the key in FILE for safe keeping.

    Its id and a checksum stand in clear text.

    FILE is any key of a participant or a service, the selector's BLS key included. The passphrase is asked for, or read
    from a file. The copy is read again and compared before its id is printed.
    """
    from tiltyard.keyfiles import write_secret

    try:
        key = load_any_key(file)
        passphrase = _new_passphrase(passphrase_file, str(copy))
        write_secret(copy, key_copy(key, passphrase))
        if public_key_of(read_key_copy(copy, passphrase)) != public_key_of(key):
            raise CommandError(f"{copy} does not hold the key that was written: is the disk sound?")
    except FileExistsError:
        fail(f"{copy} is there already")
    except (OSError, ValueError, CommandError) as error:
        fail(error)
    _print(key, copy, json)


@app.command("import")
def import_(
    copy: Annotated[Path, typer.Argument(metavar="COPY", help="What `tiltyard key export` wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the key goes; never overwritten.")],
    passphrase_file: PassphraseOption = None,
    plaintext: Annotated[bool, typer.Option("--plaintext", help="Write FILE unencrypted, with mode 0600.")] = False,
    json: JsonOption = False,
) -> None:
    """Make FILE from a copy that `key export` wrote.

    Checksum, passphrase and id are checked first; prints the id.

    FILE is encrypted under the passphrase in TILTYARD_KEY_PASSPHRASE_FILE, or else the copy's own.
    """
    from tiltyard.keyfiles import KeyLock

    try:
        lock = key_lock()
        check_is_copy(copy)
        if passphrase_file is not None:
            passphrase = KeyLock.read(passphrase_file).passphrase
        elif sys.stdin.isatty():
            passphrase = getpass.getpass(f"passphrase of {copy}: ").encode()
        else:
            raise CommandError(f"{copy} is encrypted: name a file that holds its passphrase with --passphrase-file")
        key = read_key_copy(copy, passphrase or b"")
        key.save(file, KeyLock(None if plaintext else lock.passphrase or passphrase, lock.required))
    except FileExistsError:
        fail(f"{file} is there already")
    except (OSError, ValueError, CommandError) as error:
        fail(error)
    _print(key, file, json)


def token(
    key: KeyOption,
    audience: Annotated[str, typer.Option(help="registry, selector, or the id of the node that is called.")],
    origin: OriginOption = DEFAULT_ORIGIN,
) -> None:
    """Print a bearer token of four minutes, for grpcurl.

    -H "authorization: Bearer $(tiltyard token ...)"
    """
    from tiltyard.identity import issue_token

    signer = _load(key)
    audience = audience.removeprefix("participants/")
    if audience in ("registry", "selector"):
        audience = f"{origin}/{audience}"
    elif not _PARTICIPANT_ID.fullmatch(audience):
        raise typer.BadParameter(
            f"{audience!r} is neither registry, selector nor a participant id", param_hint="--audience"
        )
    print(issue_token(signer, audience=audience))


def sign(
    kind: Annotated[str, typer.Argument(metavar="STATEMENT", help="join, submission-commit, endorsement, owner ...")],
    key: KeyOption,
    file: Annotated[str, typer.Argument(help="JSON of the statement; - reads standard input.")] = "-",
) -> None:
    """Sign a statement given as JSON, for grpcurl. Prints its Envelope as JSON."""
    from google.protobuf.json_format import Parse, ParseError

    from tiltyard.statements import STATEMENT_KINDS, sign_statement

    if kind not in STATEMENT_KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(STATEMENT_KINDS)}", param_hint="STATEMENT")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        statement = Parse(text, STATEMENT_KINDS[kind]())
        print_json(as_json(sign_statement(load_key(key), statement)))
    except (CommandError, OSError, UnicodeDecodeError, ParseError) as error:
        fail(str(error).replace("\n", " "))
