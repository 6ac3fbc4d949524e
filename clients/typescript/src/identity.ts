/** Who a participant is: an Ed25519 key, its short-lived bearer tokens, and the bytes that envelopes sign. */

import {
  createPrivateKey,
  createPublicKey,
  generateKeyPairSync,
  sign as signWith,
  verify as verifyWith,
  type KeyObject,
} from "node:crypto";
import { readFile, stat } from "node:fs/promises";

import { sha256, toHex, utf8 } from "./bytes.js";
import { createFile } from "./keptfile.js";
import { encryptedPem } from "./keyencryption.js";

export const TOKEN_LIFETIME_S = 240;
const RENEWAL_S = 60;
const PUBLIC_KEY_BYTES = 32;

/** Id of the holder of a raw 32-byte Ed25519 public key: the first 40 hex digits of its SHA-256. */
export function participantId(publicKey: Uint8Array): string {
  return toHex(sha256(publicKey)).slice(0, 40);
}

/** An Ed25519 private key. */
export class Key {
  readonly #privateKey: KeyObject;
  /** The raw public key, 32 bytes. */
  readonly publicKey: Uint8Array;
  /** The participant's id. */
  readonly id: string;

  private constructor(privateKey: KeyObject) {
    if (privateKey.asymmetricKeyType !== "ed25519") throw new TypeError("the key is of another kind than Ed25519");
    this.#privateKey = privateKey;
    const { x } = createPublicKey(privateKey).export({ format: "jwk" });
    this.publicKey = new Uint8Array(Buffer.from(x ?? "", "base64url"));
    this.id = participantId(this.publicKey);
  }

  /** A new key from the system's randomness. */
  static generate(): Key {
    return new Key(generateKeyPairSync("ed25519").privateKey);
  }

  /** The key in PKCS #8 PEM, as `tiltyard key new` writes it; `passphrase` opens an encrypted one. */
  static fromPem(pem: string, passphrase?: string): Key {
    return new Key(createPrivateKey(passphrase === undefined ? pem : { key: pem, passphrase }));
  }

  /** The key in a PKCS #8 PEM file. Throws Error for one that is not encrypted and that others may read. */
  static async load(path: string, passphrase?: string): Promise<Key> {
    const pem = await readFile(path, "utf8");
    const isEncrypted = pem.includes("-----BEGIN ENCRYPTED PRIVATE KEY-----");
    if (isEncrypted && passphrase === undefined) throw new Error(`${path} is encrypted, and no passphrase is given`);
    if (!isEncrypted) await checkClosed(path);
    return Key.fromPem(pem, passphrase);
  }

  /** Writes PKCS #8 PEM with mode 0600, whole or not at all, encrypted when there is a `passphrase`; fails where a file is. */
  async save(path: string, passphrase?: string): Promise<void> {
    const pem =
      passphrase === undefined
        ? String(this.#privateKey.export({ type: "pkcs8", format: "pem" }))
        : await encryptedPem(this.#privateKey.export({ type: "pkcs8", format: "der" }), passphrase);
    await createFile(path, pem, 0o600);
  }

  /** The 64-byte signature of `message` (RFC 8032: always the same one). */
  sign(message: Uint8Array): Uint8Array {
    return new Uint8Array(signWith(null, message, this.#privateKey));
  }
}

/** As for Python: no right for anybody else on one's own file; another's may be the group's, as secrets are mounted. */
async function checkClosed(path: string): Promise<void> {
  if (process.getuid === undefined) return; // Windows keeps rights in another way
  const { mode, uid } = await stat(path);
  const others = uid === process.getuid() ? 0o077 : 0o037;
  if (mode & others) throw new Error(`${path} may be read by others: chmod 600 ${path}`);
}

/** Whether `signature` is the holder's of `publicKey` (raw, 32 bytes) over `message`. */
export function verifySignature(publicKey: Uint8Array, message: Uint8Array, signature: Uint8Array): boolean {
  if (publicKey.length !== PUBLIC_KEY_BYTES) return false;
  const jwk = { kty: "OKP", crv: "Ed25519", x: Buffer.from(publicKey).toString("base64url") };
  return verifyWith(null, message, createPublicKey({ key: jwk, format: "jwk" }), signature);
}

/**
 * A JWT (EdDSA, RFC 8037) that proves possession of `key` to one audience for four minutes.
 *
 * `audience` is `{origin}/registry`, `{origin}/selector`, or a node's participant id; `nowS` Unix seconds.
 */
export function issueToken(key: Key, audience: string, nowS: number = Date.now() / 1000): string {
  const issuedAt = Math.floor(nowS);
  const header = {
    alg: "EdDSA",
    typ: "JWT",
    jwk: { kty: "OKP", crv: "Ed25519", x: Buffer.from(key.publicKey).toString("base64url") },
  };
  const claims = { sub: key.id, aud: audience, iat: issuedAt, exp: issuedAt + TOKEN_LIFETIME_S };
  const signed = [header, claims].map((part) => Buffer.from(JSON.stringify(part)).toString("base64url")).join(".");
  return `${signed}.${Buffer.from(key.sign(utf8(signed))).toString("base64url")}`;
}

/** Keeps one token of a key for an audience, and renews it when less than a minute is left. */
export class TokenSource {
  #token = "";
  #expiresAtS = -Infinity;

  constructor(
    private readonly key: Key,
    private readonly audience: string,
  ) {}

  /** A token that is good for another minute at least. */
  token(nowS: number = Date.now() / 1000): string {
    const leftS = this.#expiresAtS - nowS;
    // One from the future is of before the clock was set back: servers refuse it until that time has come.
    if (leftS < RENEWAL_S || leftS > TOKEN_LIFETIME_S) {
      this.#token = issueToken(this.key, this.audience, nowS);
      this.#expiresAtS = Math.floor(nowS) + TOKEN_LIFETIME_S;
    }
    return this.#token;
  }
}

/** The bytes that an envelope signs: DSSE v1's pre-authentication encoding. */
export function preAuthenticationEncoding(payloadType: string, payload: Uint8Array): Uint8Array {
  const kind = utf8(payloadType);
  const head = utf8(`DSSEv1 ${kind.length} ${payloadType} ${payload.length} `);
  return new Uint8Array(Buffer.concat([head, payload]));
}
