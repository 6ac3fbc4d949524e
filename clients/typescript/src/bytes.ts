/** Byte strings: joined, compared, and as hex, base64 and big-endian integers. */

import { createHash } from "node:crypto";

/** SHA-256 over `parts` one after the other, 32 bytes. */
export function sha256(...parts: Uint8Array[]): Uint8Array {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  return new Uint8Array(hash.digest());
}

/** Whether two byte strings are the same. */
export function equal(left: Uint8Array, right: Uint8Array): boolean {
  return Buffer.compare(left, right) === 0;
}

/** Lower-case hex digits. */
export function toHex(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString("hex");
}

/** Bytes from hex digits. Throws RangeError for anything else. */
export function fromHex(text: string): Uint8Array {
  if (text.length % 2 !== 0 || !/^[0-9a-fA-F]*$/.test(text)) throw new RangeError(`not hex: ${text}`);
  return new Uint8Array(Buffer.from(text, "hex"));
}

/** Bytes from canonical base64 with padding. Throws RangeError for anything else. */
export function fromBase64(text: string): Uint8Array {
  const bytes = Buffer.from(text, "base64");
  if (bytes.toString("base64") !== text) throw new RangeError("not canonical base64");
  return new Uint8Array(bytes);
}

/** A non-negative integer as `length` big-endian bytes. Throws RangeError when it does not fit. */
export function bigEndian(value: bigint | number, length: number): Uint8Array {
  const hex = BigInt(value).toString(16).padStart(2 * length, "0");
  if (hex.startsWith("-") || hex.length !== 2 * length) throw new RangeError(`${value} has no ${length} bytes`);
  return fromHex(hex);
}

/** The integer that big-endian bytes stand for. */
export function toInteger(bytes: Uint8Array): bigint {
  return bytes.length === 0 ? 0n : BigInt(`0x${toHex(bytes)}`);
}

const encoder = new TextEncoder();

/** A text's UTF-8. Throws RangeError for half of a surrogate pair: it has none, and would pass for U+FFFD. */
export function utf8(text: string): Uint8Array {
  const halves = /[\ud800-\udfff]/u.exec(text);
  if (halves) throw new RangeError("a text with half of a surrogate pair in it has no UTF-8");
  return encoder.encode(text);
}
