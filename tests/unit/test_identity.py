"""Keys, tokens and envelopes: what they prove, and everything that does not pass for one."""

import base64
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.identity import (
    Envelope,
    InvalidSignature,
    InvalidToken,
    Key,
    TokenSource,
    envelope_to_json,
    issue_token,
    pae,
    participant_id,
    sign_envelope,
    verify_envelope,
    verify_token,
)

AUDIENCE = "tiltyard.local/registry"
NOW = 1_800_000_000.0
KEY = Key.generate()
TYPE = "application/vnd.tiltyard.reveal.v1+proto"


def test_a_participant_id_is_the_hash_of_the_raw_key() -> None:
    # RFC 8032, section 7.1, test 1.
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = Key(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public_bytes.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.id == participant_id(key.public_bytes) == hashlib.sha256(key.public_bytes).hexdigest()[:40]
    assert key.sign(b"").hex().startswith("e5564300c360ac729086e2cc806e828a")


def test_a_saved_key_is_private_complete_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "key.pem"
    KEY.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.load(path).id == KEY.id
    with pytest.raises(FileExistsError):
        Key.generate().save(path)
    assert Key.load(path).id == KEY.id
    assert [entry.name for entry in path.parent.iterdir()] == ["key.pem"]


def test_a_key_is_created_once(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    assert Key.load_or_create(path).id == Key.load_or_create(path).id


def test_another_kind_of_key_is_refused_by_the_files_name(tmp_path: Path) -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, content in (("ec.pem", pem), ("text.pem", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            Key.load(tmp_path / name)


def test_a_key_shows_its_id_only() -> None:
    assert repr(KEY) == f"Key(id='{KEY.id}')"


def test_a_token_proves_its_key_to_its_audience() -> None:
    claims = verify_token(issue_token(KEY, audience=AUDIENCE, now=NOW), audience=AUDIENCE, now=NOW)
    assert (claims.id, claims.public_key, claims.expires_at) == (KEY.id, KEY.public_bytes, NOW + 240)
    several = {"another", AUDIENCE}
    assert verify_token(issue_token(KEY, audience=AUDIENCE, now=NOW), audience=several, now=NOW).id == KEY.id


def _token(
    changes: dict[str, Any] | None = None, header: dict[str, Any] | None = None, key: Key = KEY, **jwk: Any
) -> str:
    x = base64.urlsafe_b64encode(KEY.public_bytes).decode().rstrip("=")
    claims = {"sub": KEY.id, "aud": AUDIENCE, "iat": int(NOW), "exp": int(NOW) + 240} | (changes or {})
    claims = {name: value for name, value in claims.items() if value is not None}
    headers = {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": x} | jwk} if header is None else header
    return jwt.encode(claims, key._private_key, algorithm="EdDSA", headers=headers)


def _reason(token: str, now: float = NOW) -> str:
    with pytest.raises(InvalidToken) as caught:
        verify_token(token, audience=AUDIENCE, now=now)
    return caught.value.reason


def test_the_tokens_below_are_refused_for_what_was_changed_only() -> None:
    assert verify_token(_token(), audience=AUDIENCE, now=NOW).id == KEY.id


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (_token({"aud": "tiltyard.local/selector"}), f"another audience, 'tiltyard.local/selector', not '{AUDIENCE}'"),
        (_token({"aud": "\u202e\n" + "x" * 1000}), r"another audience, '\u202e\n" + "x" * 291 + ", not"),
        (_token({"aud": None}), "another audience"),
        (_token({"aud": [AUDIENCE, "tiltyard.local/selector"]}), "another audience"),
        (_token({"sub": "0" * 40}), "hash to sub"),
        (_token({"sub": None}), "hash to sub"),
        (_token({"exp": int(NOW) + 301}), "longer than 300"),
        (_token({"exp": None}), "exp is missing"),
        (_token({"iat": None}), "iat is missing"),
        (_token({"exp": float("nan")}), "exp is missing or not a time"),
        (_token({"exp": float("inf"), "iat": float("inf")}), "not a time"),
        (_token({"exp": "soon"}), "not a time"),
        (_token({"iat": True}), "not a time"),
        (_token({"iat": int(NOW) + 200, "exp": int(NOW) + 300}), "future"),
        (_token(header={}), "no jwk"),
        (_token(header={"jwk": "x"}), "no jwk"),
        (_token(kty="EC"), "not an Ed25519"),
        (_token(crv="Ed448"), "not an Ed25519"),
        (_token(x=7), "not an Ed25519"),
        (_token(x="AAAA"), "not an Ed25519"),
        (_token(x="!" * 43), "not an Ed25519"),
        (_token(key=Key.generate()), "signature"),
        ("hello", "not a JWT"),
        ("a.b.c", "not a JWT"),
        ("", "not a JWT"),
        ("a" * 10_000, "too long"),
    ],
)
def test_a_token_is_refused(token: str, reason: str) -> None:
    assert reason in _reason(token)


@pytest.mark.parametrize("algorithm", ["HS256", "none"])
def test_no_other_algorithm_is_believed(algorithm: str) -> None:
    headers = {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}}
    secret = KEY.public_bytes if algorithm == "HS256" else None
    assert "EdDSA" in _reason(jwt.encode({"sub": KEY.id}, secret, algorithm=algorithm, headers=headers))


def test_clocks_may_be_two_minutes_apart() -> None:
    token = issue_token(KEY, audience=AUDIENCE, now=NOW)
    for seconds in (-120, 0, 240 + 120):
        assert verify_token(token, audience=AUDIENCE, now=NOW + seconds).id == KEY.id
    assert "expired" in _reason(token, NOW + 240 + 121)
    assert "future" in _reason(token, NOW - 121)


def test_a_token_source_renews_with_a_minute_left() -> None:
    source = TokenSource(KEY, AUDIENCE)
    first = source.token(NOW)
    assert source.token(NOW + 180) == first
    renewed = source.token(NOW + 181)
    assert renewed != first
    assert verify_token(renewed, audience=AUDIENCE, now=NOW + 181).expires_at == NOW + 181 + 240


def test_a_token_is_made_anew_when_the_clock_is_set_back() -> None:
    source = TokenSource(KEY, AUDIENCE)
    source.token(NOW + 3600)
    assert verify_token(source.token(NOW), audience=AUDIENCE, now=NOW).expires_at == NOW + 240


def test_pre_authentication_encoding_is_dsse_v1() -> None:
    # The example of secure-systems-lab/dsse, protocol.md.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=200))
def test_an_envelope_names_its_signer(payload: bytes) -> None:
    assert verify_envelope(sign_envelope(KEY, TYPE, payload), payload_type=TYPE) == KEY.id


def _changed(**changes: Any) -> Envelope:
    envelope = sign_envelope(KEY, TYPE, b"payload")
    return Envelope(**(vars(envelope) | changes))


@pytest.mark.parametrize(
    "envelope",
    [
        _changed(payload=b"payloae"),
        _changed(payload_type="application/vnd.tiltyard.seal.v1+proto"),
        _changed(signature=b""),
        _changed(signature=bytes(64)),
        _changed(public_key=Key.generate().public_bytes),
        _changed(public_key=b""),
        _changed(public_key=KEY.public_bytes + b"\0"),
    ],
)
def test_an_altered_envelope_is_refused(envelope: Envelope) -> None:
    with pytest.raises(InvalidSignature):
        verify_envelope(envelope, payload_type=TYPE)


def test_an_envelope_as_json_is_dsse() -> None:
    document = json.loads(envelope_to_json(sign_envelope(KEY, TYPE, b"payload")))
    assert document["payloadType"] == TYPE
    assert base64.b64decode(document["payload"]) == b"payload"
    (signature,) = document["signatures"]
    assert signature["keyid"] == KEY.id
    assert base64.b64decode(signature["sig"]) == KEY.sign(pae(TYPE, b"payload"))
