/** Receipts of draws, checked with nothing but the selector's public key (docs/sortition.md, Receipts). */

import { isDeepStrictEqual } from "node:util";

import { bigEndian, equal, toInteger, utf8 } from "./bytes.js";
import { PublicKey } from "./bls.js";
import { drawSeed } from "./commitments.js";
import { DrawReceipt, PassedOverReason, type PassedOver, type Pick } from "./proto/tiltyard/type/v1/draw.js";
import { HASH_BYTES, SUM_BYTES, checkOrder, drawId, drawnMember, type ProvedPlace } from "./sortition.js";
import { leafHash, verifyInclusion } from "./transparency.js";

const SIGNED_TAG = "tiltyard/draw-receipts/v1";

/** A receipt that does not hold; the message says what about it. */
export class ReceiptInvalid extends Error {
  override readonly name = "ReceiptInvalid";
}

/** What stands for a receipt in the tree that the selector signs: the hash of its bytes without the signature. */
export function receiptLeaf(receipt: DrawReceipt): Uint8Array {
  return leafHash(DrawReceipt.encode({ ...receipt, signed: undefined }).finish());
}

/**
 * Reads what `tiltyard draw export` writes; fields that have their default value may be left out.
 *
 * Throws ReceiptInvalid for anything else, a value written in another way, twice or under another name included: what is
 * not signed cannot hide.
 */
export function receiptFromJson(text: string): DrawReceipt {
  let receipt: DrawReceipt;
  let isInTheOneWay: boolean;
  try {
    const document = JSON.parse(text) as Record<string, unknown>;
    receipt = { ...DrawReceipt.fromJSON(document), drawTime: timestamp(document["draw_time"]) };
    // No string of a receipt has white space in it, and JSON.parse keeps one of two values of a name.
    const isOnce = text.replace(/[ \t\r\n]/g, "") === JSON.stringify(document);
    isInTheOneWay = isOnce && isDeepStrictEqual(withoutDefaults(document), written(receipt));
  } catch (error) {
    // Brackets by the thousand included, which end in a RangeError.
    throw new ReceiptInvalid(`this is no receipt: ${String(error)}`, { cause: error });
  }
  if (!isInTheOneWay) {
    throw new ReceiptInvalid("a value is not written in the one way that protobuf's JSON form has for it");
  }
  return receipt;
}

/** The JSON form of a receipt with the contract's snake_case names, without the fields that have their default value. */
function written(receipt: DrawReceipt): unknown {
  const { drawTime, ...rest } = receipt;
  const document = renamed(DrawReceipt.toJSON({ ...rest, drawTime: undefined })) as Record<string, unknown>;
  return drawTime ? { ...document, draw_time: timestampText(drawTime) } : document;
}

function renamed(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(renamed);
  if (typeof value !== "object" || value === null) return value;
  const name = (camel: string) => camel.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [name(key), renamed(each)]));
}

function withoutDefaults(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutDefaults);
  if (typeof value !== "object" || value === null) return value;
  const isDefault = (each: unknown) => each === "" || each === 0 || each === "0" || (Array.isArray(each) && !each.length);
  const set = Object.entries(value).filter(([, each]) => !isDefault(each));
  return Object.fromEntries(set.map(([key, each]) => [key, withoutDefaults(each)]));
}

/** Throws ReceiptInvalid unless all of the receipt follows from its seed and its pool's root, signed by this key. */
export function verifyReceipt(receipt: DrawReceipt, selectorKey: Uint8Array): void {
  checkReceipt(receipt, PublicKey.from(selectorKey));
}

/** The same by a key that is used more than once; undefined is none. */
export function checkReceipt(receipt: DrawReceipt, key: PublicKey | undefined): void {
  if (!key) throw new ReceiptInvalid("the key is no BLS public key, or lies at infinity");
  checkNames(receipt);
  if (!key.verify(receipt.anchor, receipt.sigma)) {
    throw new ReceiptInvalid("sigma is not this selector's signature over the anchor");
  }
  if (!equal(receipt.seed, drawSeed({ sigma: receipt.sigma, revealSalt: receipt.revealSalt }))) {
    throw new ReceiptInvalid("the seed does not follow from sigma and the reveal's salt");
  }
  checkPlaces(receipt);
  checkMembers(receipt);
  checkSignature(receipt, key);
}

function checkSignature(receipt: DrawReceipt, key: PublicKey): void {
  const { signed } = receipt;
  if (!signed) throw new ReceiptInvalid("the receipt is not signed");
  const { root, path, signature } = signed;
  if ([root, ...path].some((hash) => hash.length !== HASH_BYTES)) {
    throw new ReceiptInvalid(`a hash of the tree of receipts that were signed together has not ${HASH_BYTES} bytes`);
  }
  const [index, size] = [BigInt(signed.index), BigInt(signed.size)];
  if (!verifyInclusion({ leaf: receiptLeaf(receipt), index, size, path, root })) {
    throw new ReceiptInvalid("this receipt is not among those signed: its path, or a value that nothing else fixes, was changed");
  }
  const message = Buffer.concat([utf8(SIGNED_TAG), bigEndian(size, 8), root]);
  if (!key.verify(message, signature)) {
    throw new ReceiptInvalid("the selector did not sign this receipt: the signature is not this key's over the root");
  }
}

function checkNames(receipt: DrawReceipt): void {
  if (!receipt.submission.startsWith(`${receipt.task}/submissions/`)) {
    throw new ReceiptInvalid("the submission is not one of the task");
  }
  if (receipt.draw !== `draws/${drawId(receipt.submission, receipt.round)}`) {
    throw new ReceiptInvalid("the draw's name does not follow from submission and round");
  }
  const sized: [string, Uint8Array, number][] = [
    ["anchor", receipt.anchor, HASH_BYTES],
    ["reveal_salt", receipt.revealSalt, HASH_BYTES],
    ["pool_root", receipt.poolRoot, HASH_BYTES],
    ["pool_weight", receipt.poolWeight, SUM_BYTES],
  ];
  for (const [name, bytes, size] of sized) {
    if (bytes.length !== size) throw new ReceiptInvalid(`${name} has ${bytes.length} bytes, not ${size}`);
  }
  if (receipt.assigned < 1 || receipt.assigned > receipt.picks.length) {
    throw new ReceiptInvalid(`${receipt.assigned} are said to be assigned, of ${receipt.picks.length} picks`);
  }
}

function checkPlaces(receipt: DrawReceipt): void {
  for (const [kind, listed] of Object.entries({ picks: receipt.picks, passed_over: receipt.passedOver })) {
    if (listed.some((each, at) => at > 0 && each.place < (listed[at - 1]?.place ?? 0))) {
      throw new ReceiptInvalid(`${kind} are not in the order of their places`);
    }
  }
  const places = [...receipt.picks, ...receipt.passedOver].map(proved).sort((a, b) => a.place - b.place);
  if (new Set(places.map((each) => each.ownerGroup)).size !== places.length) {
    throw new ReceiptInvalid("an owner group has two places");
  }
  const pool = { hash: receipt.poolRoot, leaves: receipt.poolSize, weight: number(receipt.poolWeight) };
  try {
    checkOrder(receipt.seed, places, pool);
  } catch (error) {
    throw new ReceiptInvalid(error instanceof Error ? error.message : String(error), { cause: error });
  }
}

function proved(each: Pick | PassedOver): ProvedPlace {
  const { place, ownerGroup, leafIndex, path } = each;
  return { place, ownerGroup, leafIndex, weight: number(each.groupWeight), value: number(each.value), path };
}

function checkMembers(receipt: DrawReceipt): void {
  for (const [position, pick] of receipt.picks.entries()) {
    if (pick.position !== position) throw new ReceiptInvalid(`pick ${position} is said to be at ${pick.position}`);
    // Ids are ASCII, so that JavaScript's order is that of their bytes.
    const ordered = [...new Set(pick.members)].sort();
    if (ordered.length === 0 || !isDeepStrictEqual(ordered, pick.members)) {
      throw new ReceiptInvalid(`pick ${position}: the members of its owner group are not in order of id, each once`);
    }
    if (pick.participant !== drawnMember(receipt.seed, pick.place, pick.members)) {
      throw new ReceiptInvalid(`pick ${position}: the seed picks another member of the owner group`);
    }
  }
  const unexplained = receipt.passedOver.find(
    (each) => each.reason === PassedOverReason.PASSED_OVER_REASON_UNSPECIFIED,
  );
  if (unexplained) throw new ReceiptInvalid(`place ${unexplained.place} was passed over without a reason`);
}

function number(sum: Uint8Array): bigint {
  if (sum.length !== SUM_BYTES) throw new ReceiptInvalid(`a sum or weight has ${sum.length} bytes, not ${SUM_BYTES}`);
  return toInteger(sum);
}

/** RFC 3339 with up to nine digits of a second; JavaScript's Date would keep three. */
function timestamp(text: unknown): { seconds: bigint; nanos: number } | undefined {
  if (text === undefined) return undefined;
  const parts = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z$/.exec(String(text));
  if (!parts) throw new RangeError(`not a time: ${String(text)}`);
  return { seconds: BigInt(Date.parse(`${parts[1]}Z`) / 1000), nanos: Number((parts[2] ?? "").padEnd(9, "0")) };
}

/** The same with as many digits of a second as protobuf writes: none, three, six or nine. */
function timestampText({ seconds, nanos }: { seconds: bigint; nanos: number }): string {
  const second = new Date(Number(seconds) * 1000).toISOString().slice(0, 19);
  const digits = String(nanos).padStart(9, "0").replace(/(000){1,2}$/, "");
  return nanos ? `${second}.${digits}Z` : `${second}Z`;
}
