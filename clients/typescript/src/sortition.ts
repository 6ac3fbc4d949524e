/** The order of a draw, checked from its proofs and without the pool (docs/sortition.md). */

import { bigEndian, equal, sha256, toHex, toInteger, utf8 } from "./bytes.js";

export const HASH_BYTES = 32;
export const SUM_BYTES = 16;
const MOST = 1n << 256n;
const GROUP_STREAM = Uint8Array.of(0);
const MEMBER_STREAM = Uint8Array.of(1);

/**
 * One place of an order with what proves it: leaf, weight, value, and the nodes beside the way from the leaf up to the
 * pool's root, each with its hash and its sum, HASH_BYTES + SUM_BYTES a level.
 */
export interface ProvedPlace {
  place: number;
  ownerGroup: string;
  leafIndex: bigint;
  weight: bigint;
  value: bigint;
  path: Uint8Array;
}

/** The root of a pool: its hash, and the number and summed weight of its leaves. */
export interface PoolRoot {
  hash: Uint8Array;
  leaves: bigint;
  weight: bigint;
}

/** Id of the one draw for a submission (a resource name) and round. */
export function drawId(submission: string, round: number): string {
  return toHex(sha256(utf8(`${submission}/${round}`))).slice(0, 32);
}

/** The value drawn for a place: uniform in [0, bound). */
export function drawnValue(seed: Uint8Array, place: number, bound: bigint): bigint {
  return uniform([seed, GROUP_STREAM, bigEndian(place, 4)], bound);
}

/** The one of a group's members (ids in ascending order, not empty) who is picked for a place. */
export function drawnMember(seed: Uint8Array, place: number, members: readonly string[]): string | undefined {
  return members[Number(uniform([seed, MEMBER_STREAM, bigEndian(place, 4)], BigInt(members.length)))];
}

/** Throws Error, naming the place that does not fit, unless `places` are the first of the order that seed and pool give. */
export function checkOrder(seed: Uint8Array, places: readonly ProvedPlace[], pool: PoolRoot): void {
  const before: ProvedPlace[] = [];
  for (const [expected, proved] of places.entries()) {
    if (proved.place !== expected) throw new Error(`place ${expected} of the order is missing`);
    let leftOf = provedLeftSum(proved, pool);
    let remaining = pool.weight;
    for (const earlier of before) {
      if (earlier.leafIndex === proved.leafIndex) throw new Error(`place ${expected}: its leaf was drawn before`);
      if (earlier.leafIndex < proved.leafIndex) leftOf -= earlier.weight;
      remaining -= earlier.weight;
    }
    if (remaining <= 0n || proved.value !== drawnValue(seed, expected, remaining)) {
      throw new Error(`place ${expected}: the value does not follow from the seed`);
    }
    if (proved.value < leftOf || proved.value >= leftOf + proved.weight) {
      throw new Error(`place ${expected}: the value falls on another leaf`);
    }
    before.push(proved);
  }
}

/** The weight of all leaves before this one, when its path leads to the pool's root. Throws Error when it does not. */
function provedLeftSum(proved: ProvedPlace, pool: PoolRoot): bigint {
  const at = `place ${proved.place}`;
  if (proved.leafIndex < 0n || proved.leafIndex >= pool.leaves) throw new Error(`${at}: there is no such leaf`);
  const levels = bitLength(pool.leaves - 1n);
  const nodeBytes = HASH_BYTES + SUM_BYTES;
  if (proved.path.length !== levels * nodeBytes) throw new Error(`${at}: the path has another length`);
  let hash = sha256(Uint8Array.of(0), utf8(proved.ownerGroup), bigEndian(proved.weight, SUM_BYTES));
  let sum = proved.weight;
  let leftSum = 0n;
  let index = proved.leafIndex;
  for (let level = 0; level < levels; level += 1) {
    const beside = proved.path.subarray(level * nodeBytes, (level + 1) * nodeBytes);
    const besideSum = toInteger(beside.subarray(HASH_BYTES));
    const isLeft = (index & 1n) === 1n;
    const here: [Uint8Array, Uint8Array] = [hash, bigEndian(sum, SUM_BYTES)];
    hash = sha256(Uint8Array.of(1), ...(isLeft ? [beside, ...here] : [...here, beside]));
    if (isLeft) leftSum += besideSum;
    sum += besideSum;
    index >>= 1n;
  }
  const root = sha256(Uint8Array.of(2), bigEndian(pool.leaves, 8), hash, bigEndian(sum, SUM_BYTES));
  if (sum !== pool.weight || !equal(root, pool.hash)) throw new Error(`${at}: its path does not lead to the pool's root`);
  return leftSum;
}

function uniform(stream: readonly Uint8Array[], bound: bigint): bigint {
  if (bound < 1n || bound > MOST) throw new RangeError(`no value is drawn below ${bound}`);
  const bits = bitLength(bound - 1n);
  for (let attempt = 0; ; attempt += 1) {
    const value = toInteger(sha256(...stream, bigEndian(attempt, 4))) >> BigInt(256 - bits);
    if (value < bound) return value;
  }
}

function bitLength(value: bigint): number {
  return value === 0n ? 0 : value.toString(2).length;
}
