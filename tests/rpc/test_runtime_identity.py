"""Tokens and roles over a real server: what gets through, what does not, and with which status."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime import auth
from services.runtime.auth import AccessPolicy, Authenticator, Role, current_caller
from services.runtime.channels import open_peer
from services.runtime.server import ArenaServer, Mount
from tiltyard.calls.channel import open_channel
from tiltyard.identity import Key, TokenSource, issue_token
from tiltyard.selector.v1 import stake_pb2, stake_pb2_grpc

AUDIENCE = "tiltyard.local/test"
SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class FakeClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


async def _who(_request: object, _context: object) -> StringValue:
    await asyncio.sleep(0)
    return StringValue(value=current_caller().id)


async def _who_stream(_request: object, _context: object) -> AsyncIterator[StringValue]:
    yield StringValue(value=current_caller().id)


def _mount() -> Mount:
    coders = {
        "request_deserializer": StringValue.FromString,
        "response_serializer": StringValue.SerializeToString,
    }
    handlers = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(_who, **coders),
        "unary_stream": grpc.unary_stream_rpc_method_handler(_who_stream, **coders),
        "stream_unary": grpc.stream_unary_rpc_method_handler(_who, **coders),
        "stream_stream": grpc.stream_stream_rpc_method_handler(_who_stream, **coders),
        "ForOperators": grpc.unary_unary_rpc_method_handler(_who, **coders),
    }
    return Mount(
        "test.v1.Who",
        lambda server: server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.v1.Who", handlers)]),
    )


async def who(channel: grpc.aio.Channel, shape: str = "unary_unary", token: str | None = None) -> str:
    """The id that the server takes the caller for."""
    metadata = grpc.aio.Metadata(("authorization", f"Bearer {token}")) if token is not None else grpc.aio.Metadata()
    coders = {
        "request_serializer": StringValue.SerializeToString,
        "response_deserializer": StringValue.FromString,
    }
    path = f"/test.v1.Who/{shape}"

    async def requests() -> AsyncIterator[StringValue]:
        yield StringValue()

    if shape == "stream_unary":
        return (await channel.stream_unary(path, **coders)(requests(), metadata=metadata, timeout=10)).value
    if shape == "stream_stream":
        stream: Any = channel.stream_stream(path, **coders)(requests(), metadata=metadata, timeout=10)
        return (await anext(aiter(stream))).value
    if shape == "unary_stream":
        stream = channel.unary_stream(path, **coders)(StringValue(), metadata=metadata, timeout=10)
        return (await anext(aiter(stream))).value
    return (await channel.unary_unary(path, **coders)(StringValue(), metadata=metadata, timeout=10)).value


@asynccontextmanager
async def serving(
    *mounts: Mount, authenticator: Authenticator | None = None, policy: AccessPolicy | None = None
) -> AsyncIterator[ArenaServer]:
    authenticator = authenticator or Authenticator([AUDIENCE])
    async with ArenaServer("127.0.0.1:0", mounts or [_mount()], authenticator=authenticator, policy=policy) as server:
        yield server


async def refusal(channel: grpc.aio.Channel, shape: str = "unary_unary", token: str | None = None) -> tuple[str, str]:
    """The code's name and the ErrorInfo's reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await who(channel, shape, token)
    details: Any = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return caught.value.code().name, info.reason


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_signed_channel_is_known_in_every_shape(shape: str) -> None:
    key = Key.generate()
    async with serving() as server, open_peer(server.address, key=key, audience=AUDIENCE) as channel:
        assert await who(channel, shape) == key.id


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_call_of_any_shape_works_without_a_token(shape: str) -> None:
    async with serving() as server, open_channel(server.address) as channel:
        assert await refusal(channel, shape) == ("UNAUTHENTICATED", "TOKEN_MISSING")


def _wrong_tokens() -> dict[str, str]:
    key, other = Key.generate(), Key.generate()
    now = datetime.now(UTC).timestamp()
    header = {"jwk": jwt.get_unverified_header(issue_token(key, audience=AUDIENCE))["jwk"]}
    claims = {"sub": key.id, "aud": AUDIENCE, "iat": int(now), "exp": int(now) + 200}
    good = issue_token(key, audience=AUDIENCE)
    return {
        "other audience": issue_token(key, audience="tiltyard.local/registry"),
        "expired": issue_token(key, audience=AUDIENCE, now=now - 600),
        "lives too long": issue_token(key, audience=AUDIENCE, lifetime_s=3600),
        "subject of another key": jwt.encode(
            claims | {"sub": other.id}, key._private_key, algorithm="EdDSA", headers=header
        ),
        "signed by another key": jwt.encode(claims, other._private_key, algorithm="EdDSA", headers=header),
        "HS256 keyed with the public key": jwt.encode(
            claims, key.public_bytes.hex(), algorithm="HS256", headers=header
        ),
        "unsigned": jwt.encode(claims, None, algorithm="none", headers=header),
        "no jwk": jwt.encode(claims, key._private_key, algorithm="EdDSA"),
        "altered": good[:-8] + ("AAAAAAAA" if not good.endswith("AAAAAAAA") else "BBBBBBBB"),
        "not a token": "hello",
        "empty": "",
        "huge": "a" * 5000,
    }


@pytest.mark.parametrize("name", _wrong_tokens())
async def test_a_wrong_token_is_unauthenticated(name: str) -> None:
    async with serving() as server, open_channel(server.address) as channel:
        assert await refusal(channel, token=_wrong_tokens()[name]) == ("UNAUTHENTICATED", "TOKEN_INVALID")


async def test_a_remembered_token_expires_too(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    verify = auth.verify_token
    monkeypatch.setattr(auth, "verify_token", lambda *a, **k: (checks.append(1), verify(*a, **k))[1])
    clock, key = FakeClock(), Key.generate()
    token = issue_token(key, audience=AUDIENCE, now=NOW.timestamp())
    authenticator = Authenticator([AUDIENCE], clock=clock)
    async with serving(authenticator=authenticator) as server, open_channel(server.address) as channel:
        assert [await who(channel, token=token) for _ in range(3)] == [key.id] * 3
        assert len(checks) == 1
        clock.now += timedelta(minutes=10)
        assert await refusal(channel, token=token) == ("UNAUTHENTICATED", "TOKEN_INVALID")


def test_remembered_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_REMEMBERED_TOKENS", 3)
    authenticator = Authenticator([AUDIENCE])
    for _ in range(5):
        authenticator.authenticate("Bearer " + issue_token(Key.generate(), audience=AUDIENCE))
    assert len(authenticator._checked) == 3


async def test_calls_at_the_same_time_keep_their_callers_apart() -> None:
    keys = [Key.generate() for _ in range(20)]
    tokens = [issue_token(key, audience=AUDIENCE) for key in keys]
    async with serving() as server, open_channel(server.address) as channel:
        assert await asyncio.gather(*(who(channel, token=token) for token in tokens)) == [key.id for key in keys]


@pytest.mark.parametrize(
    ("rules", "allowed"),
    [
        ({}, {"nobody", "operator", "service"}),
        ({"/test.v1.Who/ForOperators": frozenset({Role.OPERATOR})}, {"operator"}),
        ({"/test.v1.Who/*": frozenset({Role.SERVICE})}, {"service"}),
        ({"/test.v1.Who/*": frozenset({Role.SERVICE, Role.OPERATOR})}, {"operator", "service"}),
        (
            {
                "/test.v1.Who/*": frozenset({Role.SERVICE}),
                "/test.v1.Who/ForOperators": frozenset({Role.OPERATOR}),
            },
            {"operator"},
        ),
    ],
)
async def test_roles(rules: dict[str, frozenset[Role]], allowed: set[str]) -> None:
    keys = {name: Key.generate() for name in ("nobody", "operator", "service")}
    authenticator = Authenticator([AUDIENCE], operators=[keys["operator"].id], services=[keys["service"].id])
    policy = AccessPolicy(rules)
    async with serving(authenticator=authenticator, policy=policy) as server, open_channel(server.address) as channel:
        for name, key in keys.items():
            token = issue_token(key, audience=AUDIENCE)
            if name in allowed:
                assert await who(channel, "ForOperators", token) == key.id
            else:
                assert await refusal(channel, "ForOperators", token) == ("PERMISSION_DENIED", "ROLE_REQUIRED")


async def test_health_needs_no_token_and_channelz_the_operators() -> None:
    operator = Key.generate()
    authenticator = Authenticator([AUDIENCE], operators=[operator.id])
    async with serving(authenticator=authenticator) as server:
        async with open_channel(server.address) as stranger:
            answer = await health_pb2_grpc.HealthStub(stranger).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = channelz_pb2.GetServersRequest()
        async with open_peer(server.address, key=Key.generate(), audience=AUDIENCE) as participant:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channelz_pb2_grpc.ChannelzStub(participant).GetServers(request)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with open_peer(server.address, key=operator, audience=AUDIENCE) as channel:
            assert (await channelz_pb2_grpc.ChannelzStub(channel).GetServers(request)).server


class _Stakes(stake_pb2_grpc.StakeServiceServicer):
    async def GetStake(self, request: stake_pb2.GetStakeRequest, context: Any) -> stake_pb2.GetStakeResponse:
        return stake_pb2.GetStakeResponse(stake=stake_pb2.Stake(name=request.name, available_micros=7))


async def _grpcurl(*arguments: str) -> tuple[int, str]:
    command = [str(Path(sys.executable).with_name("grpcurl")), "-plaintext", *arguments]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout + done.stderr


async def test_grpcurl_lists_describes_and_calls_without_a_proto_file() -> None:
    stakes = Mount(
        "tiltyard.selector.v1.StakeService",
        lambda server: stake_pb2_grpc.add_StakeServiceServicer_to_server(_Stakes(), server),
    )
    token = TokenSource(Key.generate(), AUDIENCE).token()
    header = ("-H", f"authorization: Bearer {token}")
    async with serving(stakes) as server:
        for credentials in ((), header):
            status, text = await _grpcurl(*credentials, server.address, "list")
            assert status == 0, text
            assert "tiltyard.selector.v1.StakeService" in text.splitlines()
        status, text = await _grpcurl(*header, server.address, "describe", "tiltyard.selector.v1.Stake")
        assert status == 0, text
        assert "int64 available_micros" in text
        call = (server.address, "tiltyard.selector.v1.StakeService/GetStake")
        status, text = await _grpcurl(*header, "-d", '{"name": "stakes/x"}', *call)
        assert status == 0, text
        assert '"available_micros": "7"' in text
        status, text = await _grpcurl("-d", "{}", *call)
        assert status != 0
        assert "Unauthenticated" in text
        assert "TOKEN_MISSING" in text
