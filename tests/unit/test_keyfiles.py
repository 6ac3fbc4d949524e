"""Keys on disk: encrypted under a passphrase, closed to others, copied safely, never overwritten."""

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from tiltyard import keyfiles
from tiltyard.bls import BlsKey
from tiltyard.cli.commands import app
from tiltyard.identity import Key, LockedKey
from tiltyard.keyfiles import KeyLock, decrypt_pem, encrypt_pem

LOCK = KeyLock(b"correct horse")
OTHER = KeyLock(b"battery staple")
REQUIRED = KeyLock(b"correct horse", required=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheap key derivation, for what is not about its strength."""
    monkeypatch.setattr(keyfiles, "_COSTS", (16, 8, 1))


def tiltyard(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment)


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(result: Result) -> str:
    assert result.exit_code == 1, result.stdout
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_a_folder_made_for_a_key_is_closed_to_others(tmp_path: Path) -> None:
    Key.generate().save(tmp_path / "keys" / "me.pem")
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


@pytest.mark.usefixtures("quick")
def test_an_encrypted_key_opens_with_its_passphrase_alone(tmp_path: Path) -> None:
    key, path = Key.generate(), tmp_path / "key.pem"
    key.save(path, LOCK)
    assert key.to_pem() != path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for lock in (LOCK, REQUIRED):
        assert Key.load(path, lock).id == key.id
    with pytest.raises(LockedKey, match=r"key\.pem is encrypted"):
        Key.load(path)
    with pytest.raises(ValueError, match=r"key\.pem holds no key that this passphrase opens"):
        Key.load(path, OTHER)
    assert "horse" not in repr(LOCK)


def test_openssl_reads_our_encryption(tmp_path: Path) -> None:
    key, path = Key.generate(), tmp_path / "key.pem"
    key.save(path, LOCK)
    asn1 = subprocess.run(["openssl", "asn1parse", "-in", path], capture_output=True, text=True, check=True).stdout
    for word in ("PBES2", "scrypt", "aes-256-cbc", "4000"):  # 4000 is 16384 in hex
        assert word in asn1, asn1
    shown = subprocess.run(
        ["openssl", "pkey", "-in", path, "-passin", "pass:correct horse", "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    )
    assert shown.stdout.endswith(key.public_bytes)


@pytest.mark.usefixtures("quick")
def test_plaintext_is_refused_where_told(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    Key.generate().save(path)
    assert Key.load(path, LOCK).id == Key.load(path).id
    with pytest.raises(ValueError, match=r"key\.pem is not encrypted"):
        Key.load(path, REQUIRED)
    with pytest.raises(ValueError, match="must be encrypted"):
        Key.generate().save(tmp_path / "new.pem", KeyLock(required=True))
    assert not (tmp_path / "new.pem").exists()
    assert Key.load_or_create(tmp_path / "new.pem", REQUIRED).id == Key.load(tmp_path / "new.pem", LOCK).id


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_plaintext_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    Key.generate().save(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=r"may be read by others: chmod 600 .*key\.pem"):
        Key.load(path)
    path.chmod(0o400)
    Key.load(path)


@pytest.mark.usefixtures("quick")
def test_an_encrypted_key_may_lie_open(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    Key.generate().save(path, LOCK)
    path.chmod(0o644)
    Key.load(path, LOCK)


@pytest.mark.usefixtures("quick")
def test_the_selectors_seed_is_encrypted_too(tmp_path: Path) -> None:
    path = tmp_path / "bls.key"
    key = BlsKey.load_or_create(path, LOCK)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "BEGIN ENCRYPTED BLS SEED" in path.read_text()
    assert BlsKey.load_or_create(path, REQUIRED).public_key == key.public_key
    with pytest.raises(ValueError, match="no passphrase is given"):
        BlsKey.load_or_create(path)
    for number in range(300):  # one wrong passphrase in 256 leaves good padding
        with pytest.raises(ValueError, match="another passphrase"):
            BlsKey.load_or_create(path, KeyLock(b"wrong %d" % number))
    plain = tmp_path / "plain.key"
    BlsKey.load_or_create(plain)
    with pytest.raises(ValueError, match="not encrypted"):
        BlsKey.load_or_create(plain, REQUIRED)
    plain.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        BlsKey.load_or_create(plain)


@pytest.mark.usefixtures("quick")
def test_damage_of_any_byte_is_found_and_never_crashes(tmp_path: Path) -> None:
    pem = encrypt_pem(b"known content", b"secret", label="X")
    assert decrypt_pem(pem, b"secret", label="X") == b"known content"
    for at in range(len(pem)):
        damaged = pem[:at] + bytes([pem[at] ^ 1]) + pem[at + 1 :]
        try:
            content = decrypt_pem(damaged, b"secret", label="X")
        except ValueError:
            continue
        # The vector or the last block, which the content's reader finds; or one line break for another.
        assert content != b"known content" or pem[at : at + 1] == b"\n"


def test_a_passphrase_file_is_its_first_line(tmp_path: Path) -> None:
    file = tmp_path / "passphrase"
    for content, expected in ((b"abc", b"abc"), (b"abc\n", b"abc"), (b"a b\r\nsecond\n", b"a b")):
        file.write_bytes(content)
        assert KeyLock.read(file).passphrase == expected
    file.write_bytes(b"\nabc")
    with pytest.raises(ValueError, match="no passphrase"):
        KeyLock.read(file)
    with pytest.raises(ValueError, match="no file is named"):
        KeyLock.read(None, required=True)


@pytest.mark.usefixtures("quick")
def test_commands_encrypt_and_open_keys_by_the_environment(tmp_path: Path) -> None:
    passphrase, file = tmp_path / "passphrase", tmp_path / "me.pem"
    passphrase.write_text("correct horse\n")
    locked = {"TILTYARD_KEY_PASSPHRASE_FILE": str(passphrase)}
    made = document(tiltyard("key", "new", file, "--json", **locked))
    assert Key.load(file, LOCK).id == made["id"]
    assert document(tiltyard("key", "show", file, "--json", **locked)) == made
    assert "TILTYARD_KEY_PASSPHRASE_FILE" in refusal(tiltyard("key", "show", file))
    assert "must be encrypted" in refusal(
        tiltyard("key", "new", tmp_path / "two.pem", TILTYARD_KEY_ENCRYPTION_REQUIRED="true")
    )
    token = tiltyard("token", "--key", file, "--audience", "registry", **locked)
    assert token.exit_code == 0, token.stderr


@pytest.mark.usefixtures("quick")
def test_a_key_survives_export_and_import(tmp_path: Path) -> None:
    passphrase, file, copy, back = (tmp_path / name for name in ("passphrase", "me.pem", "me.copy", "back.pem"))
    passphrase.write_text("for the safe")
    made = document(tiltyard("key", "new", file, "--json"))
    options = ("--passphrase-file", passphrase)
    exported = document(tiltyard("key", "export", file, copy, *options, "--json"))
    assert exported["id"] == made["id"]
    text = copy.read_text()
    assert made["id"] in text
    assert "ENCRYPTED PRIVATE KEY" in text
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    imported = document(tiltyard("key", "import", copy, back, *options, "--json"))
    assert imported["id"] == made["id"]
    assert Key.load(back, KeyLock(b"for the safe")).id == made["id"]
    # A copy is a key file by itself, should this program be gone.
    assert Key.load(copy, KeyLock(b"for the safe")).id == made["id"]
    plain = tmp_path / "plain.pem"
    document(tiltyard("key", "import", copy, plain, *options, "--plaintext", "--json"))
    assert Key.load(plain).id == made["id"]
    own = tmp_path / "own"
    own.write_text("correct horse")
    again = tmp_path / "again.pem"
    document(tiltyard("key", "import", copy, again, *options, "--json", TILTYARD_KEY_PASSPHRASE_FILE=str(own)))
    assert Key.load(again, LOCK).id == made["id"]


@pytest.mark.usefixtures("quick")
def test_the_selectors_key_survives_export_and_import(tmp_path: Path) -> None:
    passphrase, file, copy, back = (tmp_path / name for name in ("passphrase", "bls.key", "bls.copy", "back.key"))
    passphrase.write_text("for the safe")
    key = BlsKey.load_or_create(file)
    options = ("--passphrase-file", passphrase)
    exported = document(tiltyard("key", "export", file, copy, *options, "--json"))
    assert exported["id"] == exported["public_key"] == key.public_key.hex()
    assert file.read_text().strip() not in copy.read_text()
    document(tiltyard("key", "import", copy, back, *options, "--plaintext", "--json"))
    assert back.read_bytes() == file.read_bytes()
    own, locked = tmp_path / "own", tmp_path / "locked.key"
    own.write_text("correct horse")
    environment = {"TILTYARD_KEY_PASSPHRASE_FILE": str(own)}
    document(tiltyard("key", "import", copy, locked, *options, "--json", **environment))
    assert BlsKey.load_or_create(locked, LOCK).public_key == key.public_key
    assert document(tiltyard("key", "show", locked, "--json", **environment))["id"] == exported["id"]
    assert "no passphrase is given" in refusal(tiltyard("key", "show", locked))
    wrong = tmp_path / "wrong"
    wrong.write_text("for the save")
    assert "another passphrase" in refusal(
        tiltyard("key", "import", copy, tmp_path / "new.key", "--passphrase-file", wrong)
    )
    file.chmod(0o644)
    assert "chmod 600" in refusal(tiltyard("key", "export", file, tmp_path / "another", *options))


@pytest.mark.usefixtures("quick")
def test_copies_never_overwrite_and_say_what_is_wrong(tmp_path: Path) -> None:
    passphrase, wrong, file, copy = (tmp_path / name for name in ("passphrase", "wrong", "me.pem", "me.copy"))
    passphrase.write_text("for the safe")
    wrong.write_text("for the save")
    document(tiltyard("key", "new", file, "--json"))
    options = ("--passphrase-file", passphrase)
    document(tiltyard("key", "export", file, copy, *options, "--json"))
    before = copy.read_bytes()
    assert "is there already" in refusal(tiltyard("key", "export", file, copy, *options))
    # No passphrase would open what is none.
    assert "is no copy" in refusal(tiltyard("key", "import", file, tmp_path / "another"))
    assert copy.read_bytes() == before
    original = file.read_bytes()
    assert "is there already" in refusal(tiltyard("key", "import", copy, file, *options))
    assert file.read_bytes() == original
    new = tmp_path / "new.pem"
    assert "passphrase opens" in refusal(tiltyard("key", "import", copy, new, "--passphrase-file", wrong))
    assert "--passphrase-file" in refusal(tiltyard("key", "import", copy, new))
    assert "--passphrase-file" in refusal(tiltyard("key", "export", file, tmp_path / "another"))
    assert "no copy" in refusal(tiltyard("key", "import", file, new, *options))
    for at in range(0, len(before), 41):
        copy.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        refusal(tiltyard("key", "import", copy, new, *options))
    other = Key(Ed25519PrivateKey.generate())
    lines = before.split(b"\n")
    lines[1] = b"id " + other.id.encode()
    copy.write_bytes(b"\n".join(lines))
    assert "not the one that it names" in refusal(tiltyard("key", "import", copy, new, *options))
    assert not new.exists()


def test_a_foreign_pkcs8_file_of_the_library_opens(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    path = tmp_path / "foreign.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"correct horse"),
        )
    )
    assert Key.load(path, LOCK).public_bytes == key.public_key().public_bytes_raw()
