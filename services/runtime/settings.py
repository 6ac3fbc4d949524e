"""Settings of a process, from TILTYARD_* variables; a wrong or unknown one stops the start with its name."""

import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, get_args

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.runtime.auth import Role
from services.runtime.connections import ConnectionLimits, file_limit
from services.runtime.limits import CallLimits
from services.runtime.telemetry import LogFormat, default_format
from tiltyard.calls.tls import SYSTEM_AUTHORITIES, ChannelTls, InvalidPem, PemFiles
from tiltyard.endpoints import check_address
from tiltyard.keyfiles import KeyLock

PREFIX = "TILTYARD_"
# A shell that drives the command line sets these; a service started from it need not know them.
_COMMAND_LINE = frozenset(
    {"TILTYARD_KEY", "TILTYARD_REGISTRY", "TILTYARD_SELECTOR", "TILTYARD_TRAINER", "TILTYARD_VALIDATOR"}
)
_SQLITE = "sqlite:///"
_DATABASE_URL = re.compile(rf"{_SQLITE}|postgresql\+\w+://")
_PARTICIPANT_ID = re.compile("[0-9a-f]{40}")

ParticipantIds = Annotated[frozenset[str], NoDecode]
"""A set of participant ids, comma-separated in the environment."""

PeerAddress = Annotated[str, AfterValidator(check_address)]
"""Where another service is: `HOST:PORT` or `unix:/PATH`."""


class ServiceSettings(BaseSettings):
    """What every service can be told. A service subclasses this, sets `service` and `listen`, and adds fields."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, validate_default=True)

    service: ClassVar[str] = "service"

    origin: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] = "tiltyard.local"
    """The arena's name, part of every audience and of everything signed."""
    state_dir: Path = Path("state")
    """The folder of all durable state of this process."""
    database_url: str = ""
    """`sqlite:///PATH` or `postgresql+psycopg://...`; default: `sqlite:///{state_dir}/{service}.db`."""
    key_file: Path = Path()
    """The key of this process (PEM). Default: `{state_dir}/key.pem`, created at the first start."""
    key_passphrase_file: Path | None = None
    """A file whose first line is the passphrase of this process's keys: new ones are encrypted under it."""
    key_encryption_required: bool = False
    """Refuses keys that lie on disk unencrypted."""
    operators: ParticipantIds = frozenset()
    """The participant ids of those who run the arena (of a node: this node), comma-separated."""
    services: ParticipantIds = frozenset()
    """The participant ids of services that may call, comma-separated: the selector obeys its registry by this."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least urgent lines that are written: `debug` has one for each call."""
    log_format: LogFormat = Field(default_factory=default_format)
    """`json` or `console`; default: `console` on a terminal, `json` elsewhere."""
    tls_certificate: Path | None = None
    """The certificate chain of this process (PEM): shown to clients, and to peers that ask for one."""
    tls_key: Path | None = None
    """The key of that certificate (PEM)."""
    tls_client_ca: Path | None = None
    """With it, a client must show a certificate that this authority signed (mutual TLS)."""
    tls_ca: str = ""
    """The authority that peers' certificates come from, as a PEM file, or `system` for those of the operating system.
    Peers are then called by TLS, those at `unix:` addresses aside; left out, they are called in plaintext."""
    calls_per_second: Annotated[float, Field(ge=0, le=1e6)] = CallLimits.per_second
    """Calls a second that one participant, or all unproven callers of one address, may start; 0: any number."""
    calls_burst: Annotated[int, Field(ge=1, le=10**7)] = CallLimits.burst
    """Calls that may be started at once after a while without any."""
    calls_in_flight: Annotated[int, Field(ge=0, le=10**6)] = CallLimits.in_flight
    """Calls of one participant that may run at once, watches included; 0: any number."""
    calls_in_flight_per_address: Annotated[int, Field(ge=0, le=10**6)] = CallLimits.in_flight_per_address
    """The same for all callers of one address, with and without a token; 0: any number."""
    calls_unlimited: Annotated[frozenset[Role], NoDecode] = CallLimits.exempt
    """The roles that have no such limits, comma-separated: operator, service, participant."""
    connections: Annotated[int, Field(ge=0, le=10**7)] = 0
    """Connections at once; 0: three quarters of the open files that the system allows this process."""
    connections_per_address: Annotated[int, Field(ge=0, le=10**7)] = 1000
    """Connections at once from one address (of IPv6: a network of 64 bits); 0: any number."""
    connections_per_second: Annotated[float, Field(ge=0, le=1e6)] = 1000
    """Connections a second that may come in all, on Linux; 0: any number."""
    connections_burst: Annotated[int, Field(ge=1, le=10**7)] = ConnectionLimits.burst
    """Connections that may come at once after a while with few, as after a restart."""
    connections_per_second_per_address: Annotated[float, Field(ge=0, le=1e6)] = 100
    """Connections a second that may come from one address, on Linux; 0: any number."""
    connections_burst_per_address: Annotated[int, Field(ge=1, le=10**7)] = ConnectionLimits.burst_per_address
    """Connections that may come at once from one address."""
    connection_age_s: Annotated[float, Field(ge=0, le=1e7)] = ConnectionLimits.age_s
    """A connection that old is asked to go, and cut ten minutes later; 0: never."""
    stream_idle_s: Annotated[float, Field(ge=0, le=1e6)] = 60.0
    """An upload of which no whole message comes for so long ends, and can be resumed; 0: never. Among many calls that
    have sent no message yet, each has so long for it."""
    plaintext_anywhere: bool = False
    """Lets a server without TLS listen beyond the loopback interface, for networks that encrypt by themselves."""
    listen: str = "127.0.0.1:0"
    """`HOST:PORT`, `[IPV6]:PORT` or `unix:/PATH`; port 0 takes a free one."""

    @classmethod
    def load(cls) -> Self:
        """The settings in the environment; prints one line naming the variable and exits with status 2 on a bad one."""
        known = {PREFIX + name.upper() for name in cls.model_fields} | _COMMAND_LINE
        for variable in sorted(os.environ):
            if variable.upper().startswith(PREFIX) and variable.upper() not in known:
                _refuse(f"{variable}: not a setting of {cls.service}")
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            text = first["msg"].removeprefix("Value error, ")
            _refuse(f"{PREFIX}{str(first['loc'][0]).upper()}: {text}" if first["loc"] else text)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_state_dir(cls, values: dict[str, Any]) -> dict[str, Any]:
        state_dir = Path(values.get("state_dir") or cls.model_fields["state_dir"].default)
        filled = dict(values)
        if not filled.get("database_url"):
            filled["database_url"] = f"sqlite:///{state_dir / cls.service}.db"
        if not filled.get("key_file"):
            filled["key_file"] = state_dir / "key.pem"
        return filled

    @field_validator("*", mode="before")
    @classmethod
    def _no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value == "" and Path in (annotation, *get_args(annotation)):
            raise ValueError("a path must not be empty")  # it would be the folder that the process was started in
        return value

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        if not _DATABASE_URL.match(value):
            raise ValueError("must be sqlite:///PATH or postgresql+psycopg://...")
        return value

    @field_validator("operators", "services", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return frozenset(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @field_validator("operators", "services")
    @classmethod
    def _participant_ids(cls, value: frozenset[str]) -> frozenset[str]:
        for participant in value:
            if not _PARTICIPANT_ID.fullmatch(participant):
                raise ValueError(f"{participant!r} is not a participant id (40 hex digits)")
        return value

    @field_validator("tls_key", "tls_client_ca")
    @classmethod
    def _tls_together(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and info.data.get("tls_certificate") is None:
            raise ValueError("needs TILTYARD_TLS_CERTIFICATE beside it")
        if value is None and info.field_name == "tls_key" and info.data.get("tls_certificate") is not None:
            raise ValueError("is needed beside TILTYARD_TLS_CERTIFICATE")
        return value

    @field_validator("tls_certificate", "tls_key", "tls_client_ca")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"{value} is not a file")
        return value

    @field_validator("tls_ca")
    @classmethod
    def _known_authority(cls, value: str) -> str:
        if value not in ("", SYSTEM_AUTHORITIES) and not Path(value).is_file():
            raise ValueError(f"{value} is not a file")
        return value

    @model_validator(mode="after")
    def _tls_fits(self) -> Self:
        try:
            PemFiles(self.tls_client_ca, self.tls_certificate, self.tls_key).read()
            if self.channel_tls is not None:
                self.channel_tls.files.read()
        except (InvalidPem, OSError) as error:
            raise ValueError(f"TILTYARD_TLS_*: {error}") from error
        return self

    @model_validator(mode="after")
    def _passphrase(self) -> Self:
        try:
            _ = self.key_lock
        except (ValueError, OSError) as error:
            raise ValueError(f"TILTYARD_KEY_PASSPHRASE_FILE: {error}") from error
        return self

    @property
    def written_folders(self) -> tuple[Path, ...]:
        """Where this process keeps what grows."""
        database = self.database_url.partition("?")[0]
        if database.startswith(_SQLITE):
            return (self.state_dir, Path(database.removeprefix(_SQLITE)).parent)
        return (self.state_dir,)

    @property
    def key_lock(self) -> KeyLock:
        """How this process's keys lie on disk."""
        return KeyLock.read(self.key_passphrase_file, required=self.key_encryption_required)

    @property
    def channel_tls(self) -> ChannelTls | None:
        """How peers are called: by TLS, or None for plaintext."""
        return ChannelTls.of(self.tls_ca, self.tls_certificate, self.tls_key)

    @field_validator("calls_unlimited", mode="before")
    @classmethod
    def _split_roles(cls, value: object) -> object:
        return frozenset(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @property
    def call_limits(self) -> CallLimits:
        """What callers may do."""
        return CallLimits(
            self.calls_per_second,
            self.calls_burst,
            self.calls_in_flight,
            self.calls_in_flight_per_address,
            self.calls_unlimited,
        )

    @property
    def connection_limits(self) -> ConnectionLimits:
        """What connections there may be."""
        total = self.connections or 3 * file_limit() // 4
        return ConnectionLimits(
            total=total,
            per_address=self.connections_per_address,
            per_second=self.connections_per_second,
            burst=self.connections_burst,
            per_second_per_address=self.connections_per_second_per_address,
            burst_per_address=self.connections_burst_per_address,
            age_s=self.connection_age_s,
        )

    @field_validator("listen")
    @classmethod
    def _listen_where_allowed(cls, value: str, info: ValidationInfo) -> str:
        if value.startswith("unix:"):
            if value == "unix:":
                raise ValueError("unix: needs a path")
            return value
        host, colon, port = value.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ValueError("must be HOST:PORT or unix:/PATH")
        plaintext = info.data.get("tls_certificate") is None and not info.data.get("plaintext_anywhere")
        if plaintext and not is_loopback(host):
            raise ValueError("beyond loopback needs TILTYARD_TLS_CERTIFICATE, or TILTYARD_PLAINTEXT_ANYWHERE=true")
        return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host` (a name other than localhost counts as reachable)."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _refuse(line: str) -> NoReturn:
    sys.stderr.write(line.replace("\n", " ") + "\n")
    raise SystemExit(2)
