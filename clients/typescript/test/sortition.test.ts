import assert from "node:assert/strict";
import { test } from "node:test";

import { PublicKey } from "../src/bls.js";
import { fromHex, toHex } from "../src/bytes.js";
import { drawSeed } from "../src/commitments.js";
import { DrawReceipt, type BatchSignature } from "../src/proto/tiltyard/type/v1/draw.js";
import { ReceiptInvalid, receiptFromJson, receiptLeaf, verifyReceipt } from "../src/receipts.js";
import { checkOrder, drawnMember, drawnValue, type ProvedPlace } from "../src/sortition.js";
import { leafHash } from "../src/transparency.js";
import { vectors } from "./vectors.js";

interface Vectors {
  seed: { public_key: string; anchor: string; sigma: string; reveal_salt: string; seed: string };
  values: { seed: string; place: number; bound: string; value: string }[];
  members: { seed: string; place: number; members: string[]; member: string }[];
  draws: {
    name: string;
    seed: string;
    leaves: [string, string][];
    total: string;
    root: string;
    order: { place: number; leaf_index: number; weight: string; value: string }[];
    paths: string[];
  }[];
  receipts: { selector_key: string; receipt: object }[];
}

const shared = vectors<Vectors>("draws.json");

test("sigma is the selector's, and the seed follows from it", () => {
  const { public_key, anchor, sigma, reveal_salt, seed } = shared.seed;
  const key = PublicKey.from(fromHex(public_key));
  assert.ok(key);
  // What has held before must not hold for anything else.
  for (let time = 0; time < 2; time += 1) {
    assert.ok(key.verify(fromHex(anchor), fromHex(sigma)));
    assert.ok(!key.verify(fromHex(anchor).with(0, 0), fromHex(sigma)));
    assert.ok(!key.verify(fromHex(anchor), fromHex(sigma).with(50, 1)));
    assert.ok(!key.verify(fromHex(anchor), Uint8Array.of(0xc0, ...new Uint8Array(95))));
    assert.ok(!key.verify(fromHex(anchor), fromHex(sigma).slice(1)));
  }
  assert.equal(PublicKey.from(Uint8Array.of(0xc0, ...new Uint8Array(47))), undefined);
  assert.equal(PublicKey.from(fromHex(public_key).with(20, 0).with(21, 0)), undefined);
  assert.equal(toHex(drawSeed({ sigma: fromHex(sigma), revealSalt: fromHex(reveal_salt) })), seed);
});

test("values and members are drawn as in the vectors", () => {
  for (const { seed, place, bound, value } of shared.values) {
    assert.equal(drawnValue(fromHex(seed), place, BigInt(bound)), BigInt(value));
  }
  for (const { seed, place, members, member } of shared.members) {
    assert.equal(drawnMember(fromHex(seed), place, members), member);
  }
  // There is none, and looking for one would not end.
  for (const bound of [0n, -1n, (1n << 256n) + 1n]) assert.throws(() => drawnValue(fromHex("00"), 0, bound), RangeError);
  assert.throws(() => drawnMember(fromHex("00"), 0, []), RangeError);
});

test("orders hold with their proofs, and fail with any weight, leaf or root changed", () => {
  for (const draw of shared.draws) {
    const places = draw.order.slice(0, draw.paths.length).map(
      ({ place, leaf_index, weight, value }, at): ProvedPlace => ({
        place,
        ownerGroup: draw.leaves[leaf_index]?.[0] ?? "",
        leafIndex: BigInt(leaf_index),
        weight: BigInt(weight),
        value: BigInt(value),
        path: fromHex(draw.paths[at] ?? ""),
      }),
    );
    const seed = fromHex(draw.seed);
    const pool = { hash: fromHex(draw.root), leaves: BigInt(draw.leaves.length), weight: BigInt(draw.total) };
    checkOrder(seed, places, pool);
    for (const [at, place] of places.entries()) {
      const changes = [{ weight: place.weight + 1n }, { value: place.value + 1n }, { ownerGroup: "other" }];
      for (const change of changes) {
        assert.throws(() => checkOrder(seed, places.with(at, { ...place, ...change }), pool), /place/);
      }
    }
    assert.throws(() => checkOrder(seed, places, { ...pool, hash: new Uint8Array(32) }), /root/);
    assert.throws(() => checkOrder(seed.with(0, 1), places, pool), /place/);
  }
});

test("receipts hold under their key, and not with a value changed that the signature alone fixes", () => {
  for (const { selector_key, receipt } of shared.receipts) {
    verifyReceipt(receiptFromJson(JSON.stringify(receipt)), fromHex(selector_key));
    const changed = receiptFromJson(JSON.stringify({ ...receipt, alpha_millis: 501 }));
    assert.throws(() => verifyReceipt(changed, fromHex(selector_key)), ReceiptInvalid);
  }
});

test("members of an owner group stand in their order, each once", () => {
  const [{ selector_key, receipt: document } = { selector_key: "", receipt: {} }] = shared.receipts;
  const receipt = receiptFromJson(JSON.stringify(document));
  for (const members of [[], ["x,x", "x"], ["b", "a"], ["a", "a"]]) {
    const picks = receipt.picks.with(0, { ...receipt.picks[0]!, members });
    assert.throws(() => verifyReceipt({ ...receipt, picks }, fromHex(selector_key)), /not in order of id, each once/);
  }
});

test("nothing can stand in a receipt's file that is not signed", () => {
  for (const { receipt } of shared.receipts as { receipt: Record<string, unknown> }[]) {
    const [pick] = receipt["picks"] as Record<string, unknown>[];
    const time = String(receipt["draw_time"]);
    for (const change of [
      { note: "drawn by hand" },
      { poolRoot: receipt["pool_root"], pool_root: "A".repeat(43) + "=" },
      { pool_root: String(receipt["pool_root"]).replace("=", "") },
      { pool_size: Number(receipt["pool_size"]) },
      { round: "1" },
      { draw_time: time.replace("Z", "000Z") },
      { task: null },
      { picks: [{ ...pick, weight: 1 }, ...(receipt["picks"] as object[]).slice(1)] },
    ]) {
      assert.throws(() => receiptFromJson(JSON.stringify({ ...receipt, ...change })), ReceiptInvalid, JSON.stringify(change));
    }
    const twice = JSON.stringify(receipt).replace("{", '{"assigned": 1,');
    assert.throws(() => receiptFromJson(twice), ReceiptInvalid);
    const indented = JSON.stringify({ ...receipt, draw_time: "2030-01-02T03:04:05Z" }, null, 2);
    assert.equal(receiptFromJson(indented).drawTime?.nanos, 0);
    assert.equal(receiptFromJson(indented.replace("05Z", "05.120Z")).drawTime?.nanos, 120_000_000);
    for (const text of ["[]", "{}x", "null", `{"a":${"[".repeat(100_000)}${"]".repeat(100_000)}}`]) {
      assert.throws(() => receiptFromJson(text), ReceiptInvalid, text.slice(0, 20));
    }
  }
});

test("what a later selector says and signs in a receipt counts, known here or not", () => {
  for (const { selector_key, receipt: document } of shared.receipts) {
    const receipt = receiptFromJson(JSON.stringify(document));
    const unknown = Buffer.of(0xa0, 6, 1); // field 100, as it comes over the wire
    const bytes = (signed: BatchSignature | undefined) =>
      Buffer.concat([DrawReceipt.encode({ ...receipt, signed }).finish(), unknown]);
    const later = DrawReceipt.decode(bytes(receipt.signed));
    assert.deepEqual(receiptLeaf(later), leafHash(bytes(undefined)));
    assert.throws(() => verifyReceipt(later, fromHex(selector_key)), /not among those signed/);
  }
});
