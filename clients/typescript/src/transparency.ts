/** The record log's arithmetic: RFC 9162 inclusion and consistency, and checkpoints as signed notes (C2SP). */

import { equal, fromBase64, sha256, utf8 } from "./bytes.js";
import { verifySignature } from "./identity.js";

const HASH_BYTES = 32;
const KEY_HASH_BYTES = 4;
const ED25519_NOTE = 1;
const EMPTY_ROOT = sha256();

/** What a log says of itself at one size; `root` has 32 bytes. */
export interface Checkpoint {
  origin: string;
  size: bigint;
  root: Uint8Array;
}

/** A note that is not of the form, is of another log, or whose signature fails. */
export class InvalidNote extends Error {
  override readonly name = "InvalidNote";
}

/** Hash of one leaf, 32 bytes (RFC 9162, 2.1.1). */
export function leafHash(entry: Uint8Array): Uint8Array {
  return sha256(Uint8Array.of(0), entry);
}

/** Hash of an inner node, 32 bytes (RFC 9162, 2.1.1). */
export function nodeHash(left: Uint8Array, right: Uint8Array): Uint8Array {
  return sha256(Uint8Array.of(1), left, right);
}

/** A tree that only grows, held by the roots of its complete subtrees, the largest first: all that has to be kept of it. */
export class Frontier {
  #size: bigint;
  readonly #hashes: Uint8Array[];

  /** Throws RangeError for hashes that a tree of this size does not have. */
  constructor(size = 0n, hashes: readonly Uint8Array[] = []) {
    const wanted = size < 0n ? -1 : size.toString(2).replaceAll("0", "").length;
    if (hashes.length !== wanted || hashes.some((hash) => hash.length !== HASH_BYTES)) {
      throw new RangeError(`a frontier of ${size} leaves has one hash of ${HASH_BYTES} bytes for each of its size's bits`);
    }
    this.#size = size;
    this.#hashes = [...hashes];
  }

  /** Number of leaves. */
  get size(): bigint {
    return this.#size;
  }

  /** Roots of the complete subtrees, the largest (leftmost) first. */
  get hashes(): readonly Uint8Array[] {
    return [...this.#hashes];
  }

  /** Adds a leaf by its hash. */
  append(leaf: Uint8Array): void {
    let current = leaf;
    for (let index = this.#size; (index & 1n) === 1n; index >>= 1n) current = nodeHash(this.#hashes.pop()!, current);
    this.#hashes.push(current);
    this.#size += 1n;
  }

  /** Root of the tree, 32 bytes; of the empty tree the hash of nothing. */
  root(): Uint8Array {
    return this.#hashes.length ? this.#hashes.reduceRight((right, left) => nodeHash(left, right)) : EMPTY_ROOT;
  }
}

/** Whether `path` proves the leaf with hash `leaf` at `index` of the tree of `size` leaves (RFC 9162, 2.1.3.2). */
export function verifyInclusion(proof: {
  leaf: Uint8Array;
  index: bigint;
  size: bigint;
  path: readonly Uint8Array[];
  root: Uint8Array;
}): boolean {
  if (proof.index < 0n || proof.index >= proof.size) return false;
  let position = proof.index;
  let last = proof.size - 1n;
  let current = proof.leaf;
  for (const value of proof.path) {
    if (last === 0n) return false;
    if ((position & 1n) === 1n || position === last) {
      current = nodeHash(value, current);
      while ((position & 1n) === 0n && position !== 0n) {
        position >>= 1n;
        last >>= 1n;
      }
    } else {
      current = nodeHash(current, value);
    }
    position >>= 1n;
    last >>= 1n;
  }
  return last === 0n && equal(current, proof.root);
}

/** Whether `path` proves that the tree with `oldRoot` is a beginning of that with `newRoot` (RFC 9162, 2.1.4.2). */
export function verifyConsistency(proof: {
  oldSize: bigint;
  newSize: bigint;
  path: readonly Uint8Array[];
  oldRoot: Uint8Array;
  newRoot: Uint8Array;
}): boolean {
  const { oldSize, newSize, path, oldRoot, newRoot } = proof;
  if (oldSize < 0n || oldSize > newSize) return false;
  if (oldSize === newSize) return path.length === 0 && equal(oldRoot, newRoot);
  if (oldSize === 0n) return path.length === 0 && equal(oldRoot, EMPTY_ROOT);
  const isPowerOfTwo = (oldSize & (oldSize - 1n)) === 0n;
  const [first, ...rest] = isPowerOfTwo ? [oldRoot, ...path] : path;
  if (first === undefined) return false;
  let position = oldSize - 1n;
  let last = newSize - 1n;
  while ((position & 1n) === 1n) {
    position >>= 1n;
    last >>= 1n;
  }
  let before = first;
  let after = first;
  for (const value of rest) {
    if (last === 0n) return false;
    if ((position & 1n) === 1n || position === last) {
      before = nodeHash(value, before);
      after = nodeHash(value, after);
      while ((position & 1n) === 0n && position !== 0n) {
        position >>= 1n;
        last >>= 1n;
      }
    } else {
      after = nodeHash(after, value);
    }
    position >>= 1n;
    last >>= 1n;
  }
  return last === 0n && equal(before, oldRoot) && equal(after, newRoot);
}

/** The checkpoint in a note that the holder of `publicKey` (raw Ed25519) signed as `name`. Throws InvalidNote. */
export function openCheckpoint(note: string, signer: { name: string; publicKey: Uint8Array }): Checkpoint {
  return parseCheckpoint(verifyNote(note, signer));
}

function parseCheckpoint(body: string): Checkpoint {
  const [origin, size, root] = body.split("\n");
  if (!origin || !size || !root || !body.endsWith("\n")) {
    throw new InvalidNote("a checkpoint has an origin, a size and a root, each on a line");
  }
  if (!/^(0|[1-9][0-9]*)$/.test(size)) throw new InvalidNote("the size is not a number");
  const bytes = decoded(root, "the root is not base64");
  if (bytes.length !== HASH_BYTES) throw new InvalidNote(`the root has ${bytes.length} bytes`);
  return { origin, size: BigInt(size), root: bytes };
}

/** What is signed of a note: its text up to the empty line. Throws InvalidNote. */
export function noteBody(note: string): string {
  const end = note.lastIndexOf("\n\n");
  if (end < 0 || !note.endsWith("\n")) throw new InvalidNote("a note is a text, an empty line, and signature lines");
  return note.slice(0, end + 1);
}

function verifyNote(note: string, signer: { name: string; publicKey: Uint8Array }): string {
  const body = noteBody(note);
  const wanted = sha256(utf8(`${signer.name}\n`), Uint8Array.of(ED25519_NOTE), signer.publicKey);
  for (const line of note.slice(body.length + 1, -1).split("\n")) {
    const parts = /^\u2014 (\S+) (\S+)$/.exec(line);
    if (!parts) throw new InvalidNote("a signature line is an em dash, a name and base64");
    const raw = decoded(parts[2] ?? "", "a signature is not base64");
    const isOurs = parts[1] === signer.name && equal(raw.subarray(0, KEY_HASH_BYTES), wanted.subarray(0, KEY_HASH_BYTES));
    if (!isOurs) continue;
    if (!verifySignature(signer.publicKey, utf8(body), raw.subarray(KEY_HASH_BYTES))) {
      throw new InvalidNote("the signature does not match");
    }
    return body;
  }
  throw new InvalidNote(`there is no signature of ${signer.name} with this key`);
}

function decoded(text: string, otherwise: string): Uint8Array {
  try {
    return fromBase64(text);
  } catch (error) {
    throw new InvalidNote(otherwise, { cause: error });
  }
}
