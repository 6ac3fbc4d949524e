import assert from "node:assert/strict";
import { chmod, mkdtemp, rm, stat } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { utf8 } from "../src/bytes.js";
import { Key, TokenSource, issueToken, participantId, verifySignature } from "../src/identity.js";
import { python } from "./python.js";

test("a token is an EdDSA JWT whose key hashes to its subject", () => {
  const key = Key.generate();
  const [header, claims, signature] = issueToken(key, "arena/registry", 1_000_000).split(".");
  const head = JSON.parse(Buffer.from(header ?? "", "base64url").toString());
  assert.equal(head.alg, "EdDSA");
  const publicKey = new Uint8Array(Buffer.from(head.jwk.x, "base64url"));
  assert.equal(participantId(publicKey), key.id);
  const body = JSON.parse(Buffer.from(claims ?? "", "base64url").toString());
  assert.deepEqual(body, { sub: key.id, aud: "arena/registry", iat: 1_000_000, exp: 1_000_240 });
  assert.ok(verifySignature(publicKey, utf8(`${header}.${claims}`), Buffer.from(signature ?? "", "base64url")));
});

test("one token serves until less than a minute of it is left", () => {
  const tokens = new TokenSource(Key.generate(), "arena/registry");
  const first = tokens.token(1_000);
  assert.equal(tokens.token(1_180), first);
  assert.notEqual(tokens.token(1_181), first);
});

test("a token is made anew when the clock is set back", () => {
  const tokens = new TokenSource(Key.generate(), "arena/registry");
  tokens.token(5_000);
  const [, claims] = tokens.token(1_000).split(".");
  assert.equal(JSON.parse(Buffer.from(claims ?? "", "base64url").toString()).iat, 1_000);
});

test("a key survives its file, plain and encrypted, and never overwrites one", async () => {
  const folder = await mkdtemp(join(tmpdir(), "tiltyard-"));
  try {
    const key = Key.generate();
    await key.save(join(folder, "plain.pem"));
    assert.equal((await stat(join(folder, "plain.pem"))).mode & 0o777, 0o600);
    assert.equal((await Key.load(join(folder, "plain.pem"))).id, key.id);
    await assert.rejects(key.save(join(folder, "plain.pem")), { code: "EEXIST" });
    await key.save(join(folder, "secret.pem"), "correct horse");
    assert.equal((await Key.load(join(folder, "secret.pem"), "correct horse")).id, key.id);
    await assert.rejects(Key.load(join(folder, "secret.pem"), "battery"));
    await assert.rejects(Key.load(join(folder, "secret.pem")), /no passphrase is given/);
    for (const name of ["plain.pem", "secret.pem"]) await chmod(join(folder, name), 0o644);
    await assert.rejects(Key.load(join(folder, "plain.pem")), /chmod 600/);
    assert.equal((await Key.load(join(folder, "secret.pem"), "correct horse")).id, key.id);
  } finally {
    await rm(folder, { recursive: true });
  }
});

test("an encrypted key is Python's to open, under scrypt, and Python's is ours", { timeout: 60_000 }, async () => {
  const script = `
import sys
from pathlib import Path
from tiltyard.identity import Key
from tiltyard.keyfiles import KeyLock, decrypt_pem
folder, lock = Path(sys.argv[1]), KeyLock(passphrase="korrekt hörse".encode())
decrypt_pem((folder / "ours.pem").read_bytes(), lock.passphrase, label="ENCRYPTED PRIVATE KEY")
theirs = Key.generate()
theirs.save(folder / "theirs.pem", lock)
print(Key.load(folder / "ours.pem", lock).id, theirs.id)`;
  const folder = await mkdtemp(join(tmpdir(), "tiltyard-"));
  try {
    const key = Key.generate();
    await key.save(join(folder, "ours.pem"), "korrekt hörse");
    const [ours, theirs] = (await python(script, folder)).split(" ");
    assert.equal(ours, key.id);
    assert.equal((await Key.load(join(folder, "theirs.pem"), "korrekt hörse")).id, theirs);
  } finally {
    await rm(folder, { recursive: true });
  }
});
