/**
 * Cosignatures of witnesses on checkpoints: who has seen a log at a size and found that it only grew, and when (C2SP
 * tlog-cosignature, cosignature/v1; a witness is named by a verifier key, `name+hash+base64`, as in signed-note).
 */

import { bigEndian, equal, fromBase64, sha256, toHex, toInteger, utf8 } from "./bytes.js";
import { verifySignature, type Key } from "./identity.js";
import { InvalidNote, noteBody } from "./transparency.js";

const COSIGNATURE = 4;
const KEY_HASH_BYTES = 4;
const TIME_BYTES = 8;
const PUBLIC_KEY_BYTES = 32;
const DASH = "\u2014 ";

/** Whose cosignatures are looked for: a name, and a raw Ed25519 key of 32 bytes. */
export class WitnessKey {
  constructor(
    readonly name: string,
    readonly publicKey: Uint8Array,
  ) {
    if (!/^[^+\s\p{C}\p{Z}]+$/u.test(name)) {
      throw new RangeError(`${JSON.stringify(name)} is no name of a witness: it may hold neither spaces nor plus signs`);
    }
    if (publicKey.length !== PUBLIC_KEY_BYTES) throw new RangeError(`a key has ${PUBLIC_KEY_BYTES} bytes`);
  }

  /** The four bytes that a signature line begins with. */
  get keyHash(): Uint8Array {
    return sha256(utf8(`${this.name}\n`), Uint8Array.of(COSIGNATURE), this.publicKey).subarray(0, KEY_HASH_BYTES);
  }

  toString(): string {
    const encoded = Buffer.from([COSIGNATURE, ...this.publicKey]).toString("base64");
    return `${this.name}+${toHex(this.keyHash)}+${encoded}`;
  }

  /** The reverse of `toString`. Throws RangeError. */
  static parse(text: string): WitnessKey {
    const [, name = "", encoded = ""] = /^([^+]+)\+[0-9a-f]+\+(.+)$/.exec(text.trim()) ?? [];
    const raw = fromBase64(encoded);
    if (raw[0] === COSIGNATURE && raw.length === 1 + PUBLIC_KEY_BYTES) {
      const found = new WitnessKey(name, raw.subarray(1));
      if (found.toString() === text.trim()) return found;
    }
    throw new RangeError("a witness is named as name+hash+base64, with an Ed25519 key for cosignature/v1");
  }
}

/** The note with one more line: that `name` saw this checkpoint at a time in seconds since 1970. */
export function cosign(note: string, key: Key, name: string, timeS: number): string {
  const witness = new WitnessKey(name, key.publicKey);
  const signature = key.sign(signedText(noteBody(note), BigInt(timeS)));
  const line = Buffer.concat([witness.keyHash, bigEndian(timeS, TIME_BYTES), signature]);
  return `${note}${DASH}${name} ${line.toString("base64")}\n`;
}

/** When the witness saw the note, in seconds since 1970. Throws InvalidNote without its valid line. */
export function verifyCosignature(note: string, witness: WitnessKey): bigint {
  const body = noteBody(note);
  for (const line of note.slice(body.length).split("\n")) {
    if (!line.startsWith(`${DASH}${witness.name} `)) continue;
    let raw: Uint8Array;
    try {
      raw = fromBase64(line.slice(DASH.length + witness.name.length + 1));
    } catch (error) {
      throw new InvalidNote("a cosignature is not base64", { cause: error });
    }
    if (!equal(raw.subarray(0, KEY_HASH_BYTES), witness.keyHash)) continue;
    const timeS = toInteger(raw.subarray(KEY_HASH_BYTES, KEY_HASH_BYTES + TIME_BYTES));
    const signature = raw.subarray(KEY_HASH_BYTES + TIME_BYTES);
    if (!verifySignature(witness.publicKey, signedText(body, timeS), signature)) {
      throw new InvalidNote(`the cosignature of ${witness.name} does not match`);
    }
    return timeS;
  }
  throw new InvalidNote(`there is no cosignature of ${witness.name} with this key`);
}

function signedText(body: string, timeS: bigint): Uint8Array {
  return utf8(`cosignature/v1\ntime ${timeS}\n${body}`);
}
