/** BLS12-381 signatures of the selector (draft-irtf-cfrg-bls-signature, message augmentation scheme). */

import { bls12_381 } from "@noble/curves/bls12-381.js";

import { equal, toHex } from "./bytes.js";

const PUBLIC_KEY_BYTES = 48;
const SIGNATURE_BYTES = 96;
const TAG = "BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_AUG_";
const { G1, G2, longSignatures: signatures } = bls12_381;
// The point at infinity: its signatures would hold for any message.
const INFINITY = Uint8Array.of(0xc0, ...new Uint8Array(PUBLIC_KEY_BYTES - 1));

/** A selector's public key: decoded once, and what it has signed is checked once, as receipts that were signed together show it. */
export class PublicKey {
  readonly #held = new Set<string>();

  private constructor(
    private readonly bytes: Uint8Array,
    private readonly point: typeof G1.Point.BASE,
  ) {}

  /** The key in 48 bytes; undefined where they are no point of the group, or the one at infinity. */
  static from(bytes: Uint8Array): PublicKey | undefined {
    if (bytes.length !== PUBLIC_KEY_BYTES || equal(bytes, INFINITY)) return undefined;
    const point = pointOf(G1, bytes);
    return point && new PublicKey(bytes.slice(), point);
  }

  /** True when `signature` (96 bytes) is the holder's over `message`; false for malformed bytes. */
  verify(message: Uint8Array, signature: Uint8Array): boolean {
    const signed = `${toHex(message)} ${toHex(signature)}`;
    if (this.#held.has(signed)) return true;
    const point = signature.length === SIGNATURE_BYTES ? pointOf(G2, signature) : undefined;
    if (!point) return false;
    const hash = signatures.hash(new Uint8Array(Buffer.concat([this.bytes, message])), TAG);
    const holds = signatures.verify(point, hash, this.point);
    if (holds) this.#held.add(signed);
    return holds;
  }
}

function pointOf<Point extends { assertValidity(): void }>(
  group: { Point: { fromBytes(bytes: Uint8Array): Point } },
  bytes: Uint8Array,
): Point | undefined {
  try {
    const point = group.Point.fromBytes(bytes);
    point.assertValidity();
    return point;
  } catch (error) {
    // The library says by an Error that bytes are no point of the group; anything else is not about the bytes.
    if (error instanceof Error) return undefined;
    throw error;
  }
}
