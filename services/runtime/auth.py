"""Who is calling and what they may call: bearer tokens, roles, and one policy by method name."""

import enum
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime

from services.runtime.errors import PermissionDenied, Unauthenticated
from tiltyard.identity import InvalidToken, TokenClaims, verify_token

_REMEMBERED_TOKENS = 4096
_LEEWAY_S = 120.0

# What a stranger needs in order to find out how to talk to a server at all.
_FREE_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


class Role(enum.Enum):
    """What a caller is to this server. Everybody with a valid token is a participant."""

    PARTICIPANT = "participant"
    OPERATOR = "operator"
    SERVICE = "service"


@dataclass(frozen=True)
class Caller:
    """The proven caller: participant id, raw Ed25519 public key, roles."""

    id: str
    public_key: bytes
    roles: frozenset[Role]


_caller: ContextVar[Caller] = ContextVar("tiltyard_caller")
_address: ContextVar[str] = ContextVar("tiltyard_caller_address", default="")


def current_caller() -> Caller:
    """The caller of the call being served. Raises Unauthenticated outside of an authenticated call."""
    caller = _caller.get(None)
    if caller is None:
        raise Unauthenticated("TOKEN_MISSING", "this method needs a bearer token")
    return caller


def maybe_caller() -> Caller | None:
    """The caller of the call being served, or None where no token was asked for."""
    return _caller.get(None)


def current_address() -> str:
    """What the caller's end of the connection counts as; empty on a Unix socket, and outside of a call with a token."""
    return _address.get()


def set_caller(caller: Caller, address: str = "") -> None:
    """Names the caller, and its address where it has one, for the rest of the current task."""
    _caller.set(caller)
    _address.set(address)


def utc_now() -> datetime:
    """The clock of a composition root; everything else is given one."""
    return datetime.now(UTC)


class Authenticator:
    """Turns an `authorization` header into a Caller.

    A token that was checked is remembered until it expires, since checking a signature costs more than most calls.
    """

    def __init__(
        self,
        audiences: Collection[str],
        operators: Collection[str] = (),
        services: Collection[str] = (),
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._audiences = frozenset(audiences)
        self._operators = frozenset(operators)
        self._services = frozenset(services)
        self._clock = clock
        self._checked: OrderedDict[str, tuple[Caller, float]] = OrderedDict()

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller who sent this header (`Bearer <token>`). Raises Unauthenticated."""
        if not authorization:
            raise Unauthenticated("TOKEN_MISSING", "this method needs a bearer token")
        now = self._clock().timestamp()
        caller, expires_at = self._checked.get(authorization, (None, 0.0))
        if caller is not None and now <= expires_at + _LEEWAY_S:
            self._checked.move_to_end(authorization)
            return caller
        self._checked.pop(authorization, None)
        claims = self._verify(authorization, now)
        caller = Caller(id=claims.id, public_key=claims.public_key, roles=self._roles(claims.id))
        self._checked[authorization] = (caller, claims.expires_at)
        if len(self._checked) > _REMEMBERED_TOKENS:
            self._checked.popitem(last=False)
        return caller

    def knows(self, authorization: str | None) -> bool:
        """Whether this header was checked before: all others cost a signature's check."""
        return authorization in self._checked

    def _verify(self, authorization: str, now: float) -> TokenClaims:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("TOKEN_INVALID", "authorization must be: Bearer <token>")
        try:
            return verify_token(token, audience=self._audiences, now=now, leeway_s=_LEEWAY_S)
        except InvalidToken as error:
            raise Unauthenticated("TOKEN_INVALID", f"the bearer token is not valid here: {error.reason}") from None

    def _roles(self, participant: str) -> frozenset[Role]:
        roles = {Role.PARTICIPANT}
        if participant in self._operators:
            roles.add(Role.OPERATOR)
        if participant in self._services:
            roles.add(Role.SERVICE)
        return frozenset(roles)


class AccessPolicy:
    """Which roles a method asks for, by full name (`/pkg.Service/Method`) or whole service (`/pkg.Service/*`).

    One of the named roles is enough; a method's own rule goes before its service's. What no rule names is open to every
    participant. Health and reflection are free of tokens, channelz is the operator's.
    """

    def __init__(self, rules: Mapping[str, frozenset[Role]] | None = None) -> None:
        self._rules = {"/grpc.channelz.v1.Channelz/*": frozenset({Role.OPERATOR}), **(rules or {})}
        self._asked_for: dict[str, frozenset[Role]] = {}

    def is_free(self, method: str) -> bool:
        """Whether `method` answers without a token."""
        return method.startswith(_FREE_SERVICES)

    def check(self, method: str, caller: Caller) -> None:
        """Raises PermissionDenied when `caller` has none of the roles that `method` asks for."""
        rule = self._asked_for.get(method)
        if rule is None:
            whole_service = self._rules.get(method.rpartition("/")[0] + "/*", frozenset({Role.PARTICIPANT}))
            rule = self._asked_for[method] = self._rules.get(method, whole_service)
        if rule.isdisjoint(caller.roles):
            roles = ", ".join(sorted(role.value for role in rule))
            raise PermissionDenied("ROLE_REQUIRED", f"{method} needs the role {roles}", method=method, roles=roles)
