"""`tiltyard key`, `token` and `sign`: keys, and what they prove to a server or to everyone."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltyard.cli.connection import DEFAULT_ORIGIN, CommandError, JsonOption, KeyOption, OriginOption, fail, load_key
from tiltyard.cli.output import as_json, print_json

if TYPE_CHECKING:
    from tiltyard.identity import Key

app = typer.Typer(help="Make and show keys.", no_args_is_help=True)


def _load(path: Path) -> "Key":
    try:
        return load_key(path)
    except CommandError as error:
        fail(str(error))


def _show(path: Path, json: bool) -> None:
    key = _load(path)
    if json:
        print_json({"id": key.id, "public_key": key.public_bytes.hex(), "file": str(path)})
    else:
        print(f"id          {key.id}\npublic key  {key.public_bytes.hex()}")


@app.command("new")
def new(file: Path, json: JsonOption = False) -> None:
    """Make a new Ed25519 key in FILE (PKCS #8 PEM, readable by you alone); never overwrites."""
    from tiltyard.identity import Key

    try:
        Key.generate().save(file)
    except FileExistsError:
        fail(f"{file} is there already")
    except OSError as error:
        fail(str(error))
    _show(file, json)


@app.command("show")
def show(file: Path, json: JsonOption = False) -> None:
    """Print the participant id and the public key of the key in FILE."""
    _show(file, json)


@app.command("id")
def id_(file: Path) -> None:
    """Print the participant id of the key in FILE and nothing else."""
    print(_load(file).id)


def token(
    key: KeyOption,
    audience: Annotated[str, typer.Option(help="registry, selector, or the id of the node that is called.")],
    origin: OriginOption = DEFAULT_ORIGIN,
) -> None:
    """Print a bearer token of four minutes, for grpcurl: -H "authorization: Bearer $(tiltyard token ...)"."""
    from tiltyard.identity import issue_token

    signer = _load(key)
    if audience in ("registry", "selector"):
        audience = f"{origin}/{audience}"
    print(issue_token(signer, audience=audience.removeprefix("participants/")))


def sign(
    kind: Annotated[str, typer.Argument(metavar="STATEMENT", help="join, submission-commit, endorsement, owner ...")],
    key: KeyOption,
    file: Annotated[str, typer.Argument(help="JSON of the statement; - reads standard input.")] = "-",
) -> None:
    """Sign a statement given as JSON and print its Envelope as JSON, ready for grpcurl."""
    from google.protobuf.json_format import Parse, ParseError

    from tiltyard.statements import STATEMENT_KINDS, sign_statement

    if kind not in STATEMENT_KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(STATEMENT_KINDS)}", param_hint="STATEMENT")
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        statement = Parse(text, STATEMENT_KINDS[kind]())
        print_json(as_json(sign_statement(load_key(key), statement)))
    except (CommandError, OSError, UnicodeDecodeError, ParseError) as error:
        fail(str(error).replace("\n", " "))
