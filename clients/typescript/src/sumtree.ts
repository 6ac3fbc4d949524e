/** The Merkle sum tree of a pool (docs/sortition.md): leaves with an id and a weight, whose root fixes all of them. */

import { bigEndian, sha256, utf8 } from "./bytes.js";
import { HASH_BYTES, SUM_BYTES } from "./sortition.js";

interface Node {
  /** Hash and sum, one after the other. */
  record: Uint8Array;
  sum: bigint;
}

const EMPTY: Node = { record: new Uint8Array(HASH_BYTES + SUM_BYTES), sum: 0n };

/** A complete binary tree, kept in an array: below node i are 2i and 2i + 1. A leaf keeps its index for ever. */
export class SumTree {
  readonly #ids: string[] = [];
  #capacity = 1;
  #nodes: Node[] = [EMPTY, EMPTY];

  /** Number of leaves. */
  get size(): number {
    return this.#ids.length;
  }

  /** Sum of all weights. */
  get total(): bigint {
    return this.#nodes[1]!.sum;
  }

  /** Adds a leaf and returns its index. Throws RangeError when the sum would reach 2^128. */
  append(id: string, weight: bigint): number {
    if (this.#ids.length === this.#capacity) this.#grow();
    this.#ids.push(id);
    this.setWeight(this.#ids.length - 1, weight);
    return this.#ids.length - 1;
  }

  /** Changes the weight of a leaf. Throws RangeError when the sum would reach 2^128, or without such a leaf. */
  setWeight(index: number, weight: bigint): void {
    const id = this.#ids[index];
    if (id === undefined) throw new RangeError(`no leaf ${index} among ${this.size}`);
    const nodes = this.#nodes;
    let at = this.#capacity + index;
    nodes[at] = node(sha256(Uint8Array.of(0), utf8(id), bigEndian(weight, SUM_BYTES)), weight);
    for (at >>= 1; at >= 1; at >>= 1) nodes[at] = above(nodes[2 * at]!, nodes[2 * at + 1]!);
  }

  /** The root, 32 bytes: it fixes every id, weight and place. */
  root(): Uint8Array {
    return sha256(Uint8Array.of(2), bigEndian(this.size, 8), this.#nodes[1]!.record);
  }

  /** Doubles the room. */
  #grow(): void {
    const leaves = this.#nodes.slice(this.#capacity);
    this.#capacity *= 2;
    const nodes = new Array<Node>(2 * this.#capacity).fill(EMPTY);
    for (const [index, leaf] of leaves.entries()) nodes[this.#capacity + index] = leaf;
    for (let at = this.#capacity - 1; at >= 1; at -= 1) nodes[at] = above(nodes[2 * at]!, nodes[2 * at + 1]!);
    this.#nodes = nodes;
  }
}

function node(hash: Uint8Array, sum: bigint): Node {
  return { record: new Uint8Array(Buffer.concat([hash, bigEndian(sum, SUM_BYTES)])), sum };
}

function above(left: Node, right: Node): Node {
  return node(sha256(Uint8Array.of(1), left.record, right.record), left.sum + right.sum);
}
