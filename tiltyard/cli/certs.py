"""`tiltyard certs`: certificates for the services of an arena, from an authority of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from tiltyard.cli.connection import JsonOption, fail
from tiltyard.cli.output import print_json

NAMES = ("registry", "selector", "trainer", "validator", "client")
_EVERYWHERE = ("localhost", "127.0.0.1", "::1")

app = typer.Typer(help="Make certificates for TLS.", no_args_is_help=True)


@app.callback()
def _certs() -> None:
    """Keeps `dev` a command of its own name while it is the only one."""


@app.command("dev")
def dev(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.")],
    san: Annotated[
        list[str] | None,
        typer.Option(help="A host name or address to be good for, or NAME=HOST for one certificate; repeatable."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="A further certificate, beside those of the services; repeatable.")
    ] = None,
    days: Annotated[float, typer.Option(min=0.001, max=3650, help="How long certificates are good.")] = 90,
    json: JsonOption = False,
) -> None:
    """Make an authority and certificates of it in DIR.

    The authority once; a certificate for each service and for clients each time anew.

    Services take new files without a restart. Each certificate is good for localhost and for its own name as a host.
    """
    from tiltyard.authority import Authority, check_host

    names = (*NAMES, *(name or ()))
    for each in names:
        if not each.replace("-", "").replace("_", "").isalnum() or each == "ca":
            raise typer.BadParameter(f"{each!r} can't be a file's name", param_hint="--name")
    hosts: dict[str, list[str]] = {each: [each, *_EVERYWHERE] for each in names}
    for entry in san or ():
        target, equals, host = entry.rpartition("=")
        if equals and target not in hosts:
            raise typer.BadParameter(f"{target!r} is none of {', '.join(names)}", param_hint="--san")
        for each in (target,) if equals else names:
            hosts[each].append(host)
    try:
        for host in {host for each in hosts.values() for host in each}:
            check_host(host)
        authority = Authority.open(folder)
        issued = [authority.issue(each, hosts[each], days=days) for each in names]
    except (ValueError, OSError) as error:
        fail(error)
    if json:
        print_json(
            {
                "ca": str(authority.certificate),
                "certificates": [
                    {
                        "name": each.name,
                        "certificate": str(each.certificate),
                        "key": str(each.key),
                        "hosts": list(each.hosts),
                        "not_after": each.not_after.isoformat(),
                    }
                    for each in issued
                ],
            }
        )
        return
    print(f"authority  {authority.certificate}")
    for each in issued:
        print(f"{each.name:<10} {each.certificate}  until {each.not_after:%Y-%m-%d %H:%M} UTC  {', '.join(each.hosts)}")
    where = folder.absolute()
    print(
        f"\nFor a service: TILTYARD_TLS_CERTIFICATE={where}/NAME.pem TILTYARD_TLS_KEY={where}/NAME.key\n"
        f"To ask callers for a certificate, too: TILTYARD_TLS_CLIENT_CA={where}/ca.pem\n"
        f"For whoever calls one: TILTYARD_TLS_CA={where}/ca.pem"
    )
