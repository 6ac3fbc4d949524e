import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import { before, test } from "node:test";

import { audit, readRecord, type RecordLog } from "../src/index.js";
import { Leaderboard } from "../src/proto/tiltyard/registry/v1/leaderboard.js";
import { vectors } from "./vectors.js";

interface Case {
  name: string;
  log: string;
  changed: Record<string, string>;
  left_out: number[];
  added: string[];
  note: string | null;
  shown: object[];
  found: [string, number | null][];
  checked: Record<string, number>;
  pending: number;
  pending_since_ns: string | null;
  hidden: string[];
}

const logs = new Map<string, RecordLog>();

before(async () => {
  for (const name of ["submission", "arena"]) {
    const folder = fileURLToPath(new URL(`../../../../tests/vectors/audit/${name}`, import.meta.url));
    logs.set(name, await readRecord(folder));
  }
});

function bytes(base64: string): Uint8Array {
  return new Uint8Array(Buffer.from(base64, "base64"));
}

/** The log of a case, with what is changed in it. */
function changed({ log, left_out, added, note, ...each }: Case): RecordLog {
  const honest = logs.get(log)!;
  const leaves = honest.leaves.map((leaf, index) => {
    const other = each.changed[index];
    return other === undefined ? leaf : bytes(other);
  });
  const kept = leaves.filter((_, index) => !left_out.includes(index));
  return { note: note ?? honest.note, leaves: [...kept, ...added.map(bytes)] };
}

for (const each of vectors<{ cases: Case[] }>("audit/cases.json").cases) {
  test(`what is found is what Python finds: ${each.name.slice(0, 60)}`, () => {
    const out = audit(changed(each), { shown: each.shown.map((board) => Leaderboard.fromJSON(board)) });
    const found = out.failures.map(({ claim, index }) => JSON.stringify([claim, index ?? null]));
    const reasons = out.failures.map(({ reason }) => reason).join("\n");
    assert.deepEqual([...new Set(found)], each.found.map((one) => JSON.stringify(one)), reasons);
    assert.deepEqual({ ...out.checked }, each.checked);
    assert.equal(out.pending, each.pending);
    assert.equal(out.pendingSinceNs?.toString() ?? null, each.pending_since_ns);
    assert.deepEqual(out.hidden, each.hidden);
  });
}
