/** Messages read as every language reads them: what is signed or hashed must not say two things to two readers. */

import { BinaryReader } from "@bufbuild/protobuf/wire";

import { equal } from "./bytes.js";

/** What writes and reads one kind of message. */
export interface Codec<T> {
  encode(message: T): { finish(): Uint8Array };
  decode(bytes: BinaryReader | Uint8Array): T;
}

/** Refuses a text that is no UTF-8, which would pass for another one. */
class TextReader extends BinaryReader {
  override string(): string {
    return super.string(true);
  }
}

/**
 * The message in `bytes`. Throws Error for what is none, and for one that is written otherwise than what it says: with a field
 * twice, of which some readers take the last and others both, or a message that ends elsewhere than it is said to.
 *
 * The order of fields is free: what a later version says, and this does not know, stands last when it is written again.
 */
export function readMessage<T>(codec: Codec<T>, bytes: Uint8Array): T {
  const message = codec.decode(new TextReader(bytes));
  const written = codec.encode(message).finish();
  const isSaid = equal(written, bytes) || equal(written.sort(), Uint8Array.from(bytes).sort()) || hasNegativeZero(message);
  if (!isSaid) throw new Error(`its ${bytes.length} bytes are not those that what it says is written in`);
  return message;
}

/** Whether a number is -0, which is written by others and not by this. */
function hasNegativeZero(value: unknown): boolean {
  if (typeof value !== "object" || value === null || ArrayBuffer.isView(value)) return Object.is(value, -0);
  return Object.values(value).some(hasNegativeZero);
}
