import assert from "node:assert/strict";
import { createPrivateKey } from "node:crypto";
import { test } from "node:test";

import { fromHex, toHex, utf8 } from "../src/bytes.js";
import { evaluationSeal, submissionCommitment } from "../src/commitments.js";
import { Key } from "../src/identity.js";
import { COMMIT, openStatement, signStatement } from "../src/statements.js";
import { Frontier, InvalidNote, leafHash, openCheckpoint, verifyConsistency, verifyInclusion } from "../src/transparency.js";
import { vectors } from "./vectors.js";

interface Vectors {
  entries: string[];
  inclusion: { index: number; size: number; leaf: string; root: string; path: string[] }[];
  consistency: { old_size: number; new_size: number; old_root: string; new_root: string; path: string[] }[];
  checkpoint: { seed: string; public_key: string; name: string; size: number; root: string; note: string };
  statement: {
    origin: string;
    task: string;
    participant: string;
    model_digest: string;
    salt: string;
    commitment: string;
    payload_type: string;
    payload: string;
    signature: string;
    seal: { assignment: string; report: string; value: string };
  };
}

const shared = vectors<Vectors>("transparency.json");
const signer = { name: shared.checkpoint.name, publicKey: fromHex(shared.checkpoint.public_key) };

/** The key whose 32-byte seed the vectors name, by way of PKCS #8. */
function vectorKey(): Key {
  const der = Buffer.concat([fromHex("302e020100300506032b657004220420"), fromHex(shared.checkpoint.seed)]);
  const pem = createPrivateKey({ key: der, format: "der", type: "pkcs8" }).export({ type: "pkcs8", format: "pem" });
  return Key.fromPem(String(pem));
}

test("inclusion proofs hold, and fail with any node changed, added or dropped", () => {
  for (const vector of shared.inclusion) {
    const leaf = leafHash(utf8(shared.entries[vector.index] ?? ""));
    assert.equal(toHex(leaf), vector.leaf);
    const path = vector.path.map(fromHex);
    const proof = { leaf, index: BigInt(vector.index), size: BigInt(vector.size), path, root: fromHex(vector.root) };
    assert.ok(verifyInclusion(proof));
    assert.ok(!verifyInclusion({ ...proof, path: [...path, leaf] }));
    assert.ok(!verifyInclusion({ ...proof, index: proof.size }));
    for (const at of path.keys()) {
      assert.ok(!verifyInclusion({ ...proof, path: path.with(at, new Uint8Array(32)) }));
      assert.ok(!verifyInclusion({ ...proof, path: path.toSpliced(at, 1) }));
    }
  }
});

test("inclusion proofs of no place, no tree, or another size do not hold", () => {
  const leaf = leafHash(utf8("leaf"));
  const one = { leaf, index: 0n, size: 1n, path: [], root: leaf };
  assert.ok(verifyInclusion(one));
  for (const change of [
    { index: 1n },
    { index: -1n },
    { index: 2n ** 63n },
    { size: 0n },
    { size: -1n },
    { size: 2n },
    { size: 2n ** 64n },
    { path: [leaf] },
    { path: [new Uint8Array()] },
    { leaf: new Uint8Array() },
    { root: new Uint8Array() },
    { leaf: new Uint8Array(), root: new Uint8Array(), size: 2n },
  ]) {
    assert.ok(!verifyInclusion({ ...one, ...change }), String(Object.entries(change)));
  }
});

test("a frontier is read back, and no other number of hashes is", () => {
  const tree = new Frontier();
  const sizes = shared.entries.map((entry) => {
    tree.append(leafHash(utf8(entry)));
    const again = new Frontier(tree.size, tree.hashes);
    assert.deepEqual(again.root(), tree.root());
    return Number(again.size);
  });
  assert.deepEqual(sizes, shared.entries.map((_, at) => at + 1));
  for (const vector of shared.inclusion.filter(({ size }) => size === sizes.length)) {
    assert.equal(toHex(tree.root()), vector.root);
  }
  for (const [size, hashes] of [
    [1n, []],
    [0n, [leafHash(utf8(""))]],
    [-1n, []],
    [1n, [new Uint8Array(31)]],
  ] as const) {
    assert.throws(() => new Frontier(size, hashes), RangeError);
  }
});

test("consistency proofs hold, and fail for another history", () => {
  for (const vector of shared.consistency) {
    const proof = {
      oldSize: BigInt(vector.old_size),
      newSize: BigInt(vector.new_size),
      path: vector.path.map(fromHex),
      oldRoot: fromHex(vector.old_root),
      newRoot: fromHex(vector.new_root),
    };
    assert.ok(verifyConsistency(proof), `${vector.old_size} to ${vector.new_size}`);
    assert.ok(!verifyConsistency({ ...proof, oldRoot: new Uint8Array(32) }));
    if (vector.old_size !== 0) assert.ok(!verifyConsistency({ ...proof, newRoot: new Uint8Array(32) }));
  }
});

test("a checkpoint opens with its log's key and with no other", () => {
  const opened = openCheckpoint(shared.checkpoint.note, signer);
  assert.deepEqual(opened, {
    origin: shared.checkpoint.name,
    size: BigInt(shared.checkpoint.size),
    root: fromHex(shared.checkpoint.root),
  });
  const other = { ...signer, publicKey: Key.generate().publicKey };
  assert.throws(() => openCheckpoint(shared.checkpoint.note, other), InvalidNote);
  const rewritten = shared.checkpoint.note.replace("\n13\n", "\n12\n");
  assert.throws(() => openCheckpoint(rewritten, signer), InvalidNote);
});

test("a statement is signed byte for byte as in Python", () => {
  const { origin, task, salt, model_digest, seal, ...wanted } = shared.statement;
  const key = vectorKey();
  const participant = `participants/${key.id}`;
  assert.equal(key.id, wanted.participant);
  const salted = { salt: fromHex(salt), modelDigest: fromHex(model_digest) };
  const commitment = submissionCommitment({ origin, task, participant, ...salted });
  assert.equal(toHex(commitment), wanted.commitment);
  const envelope = signStatement(key, COMMIT, { origin, task, participant, commitment });
  assert.equal(envelope.payloadType, wanted.payload_type);
  assert.equal(toHex(envelope.payload), wanted.payload);
  assert.equal(toHex(envelope.signature), wanted.signature);
  assert.equal(openStatement(envelope, COMMIT).signer, key.id);
  assert.throws(() => openStatement({ ...envelope, payload: new Uint8Array(3) }, COMMIT), /signature/);
  const sealed = evaluationSeal({ assignment: seal.assignment, report: fromHex(seal.report), salt: fromHex(salt) });
  assert.equal(toHex(sealed), seal.value);
});
