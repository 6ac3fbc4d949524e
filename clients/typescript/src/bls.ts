/** BLS12-381 signatures of the selector (draft-irtf-cfrg-bls-signature, message augmentation scheme). */

import { bls12_381 } from "@noble/curves/bls12-381.js";

import { equal } from "./bytes.js";

const PUBLIC_KEY_BYTES = 48;
const SIGNATURE_BYTES = 96;
const TAG = "BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_AUG_";
const signatures = bls12_381.longSignatures;
// The point at infinity: its signatures would hold for any message.
const INFINITY = Uint8Array.of(0xc0, ...new Uint8Array(PUBLIC_KEY_BYTES - 1));

/** True for the 48 bytes of a point that a key can have: in the right group, and not at infinity. */
export function isPublicKey(publicKey: Uint8Array): boolean {
  if (publicKey.length !== PUBLIC_KEY_BYTES || equal(publicKey, INFINITY)) return false;
  return pointHolds(() => bls12_381.G1.Point.fromBytes(publicKey).assertValidity());
}

/** True when `signature` (96 bytes) is the holder's over `message`; false for malformed bytes. */
export function verify(publicKey: Uint8Array, message: Uint8Array, signature: Uint8Array): boolean {
  if (!isPublicKey(publicKey) || signature.length !== SIGNATURE_BYTES) return false;
  if (!pointHolds(() => bls12_381.G2.Point.fromBytes(signature).assertValidity())) return false;
  const augmented = new Uint8Array(Buffer.concat([publicKey, message]));
  return signatures.verify(signature, signatures.hash(augmented, TAG), publicKey);
}

function pointHolds(decode: () => void): boolean {
  try {
    decode();
    return true;
  } catch (error) {
    // The library says by an Error that bytes are no point of the group; anything else is not about the bytes.
    if (error instanceof Error) return false;
    throw error;
  }
}
