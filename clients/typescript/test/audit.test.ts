import assert from "node:assert/strict";
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { CLAIMS, InvalidRecord, Key, audit, readRecord, writeRecord, type Claim, type RecordLog } from "../src/index.js";
import { LogEntry } from "../src/proto/tiltyard/type/v1/log.js";
import { python } from "./python.js";

type Entry = NonNullable<LogEntry["entry"]>;

let folder: string;
let honest: RecordLog;

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "tiltyard-audit-"));
  // A log by hand: one submission, judged by three of four validators.
  const script = `
import sys
from pathlib import Path
from tests.support.told_log import ToldLog
from tiltyard.audit import write_record
write_record(ToldLog().tell().record(), Path(sys.argv[1]))`;
  await python(script, join(folder, "log"));
  honest = await readRecord(join(folder, "log"));
});

after(() => rm(folder, { recursive: true }));

/** The honest record with the first leaf of a kind changed, and where that is. */
function changed<Kind extends Entry["$case"]>(
  kind: Kind,
  change: (value: Extract<Entry, { $case: Kind }>["value"]) => void,
): { record: RecordLog; index: number } {
  const entries = honest.leaves.map((leaf) => LogEntry.decode(leaf));
  const index = entries.findIndex(({ entry }) => entry?.$case === kind);
  const entry = entries[index]!;
  (change as (value: unknown) => void)(entry.entry!.value);
  return { record: { ...honest, leaves: honest.leaves.with(index, LogEntry.encode(entry).finish()) }, index };
}

function without(kind: Entry["$case"]): RecordLog {
  return { ...honest, leaves: honest.leaves.filter((leaf) => LogEntry.decode(leaf).entry?.$case !== kind) };
}

test("an honest log passes, and every claim was checked on something", () => {
  const found = audit(honest);
  assert.deepEqual(found.failures, []);
  for (const claim of Object.keys(CLAIMS) as Claim[]) assert.ok(found.checked[claim] > 0, claim);
  assert.equal(found.size, honest.leaves.length);
});

test("every leaf is signed, their order and number too, and so is the note", () => {
  const rootFails = (record: RecordLog) => assert.ok(audit(record).failures.some(({ claim }) => claim === "root"));
  for (const [index, leaf] of honest.leaves.entries()) {
    rootFails({ ...honest, leaves: honest.leaves.with(index, leaf.with(0, leaf[0]! ^ 1)) });
  }
  rootFails({ ...honest, leaves: honest.leaves.slice(0, -1) });
  rootFails({ ...honest, leaves: [...honest.leaves, honest.leaves.at(-1)!] });
  rootFails({ ...honest, leaves: honest.leaves.with(3, honest.leaves[4]!).with(4, honest.leaves[3]!) });
  rootFails({ ...honest, leaves: [] });
  rootFails({ ...honest, note: honest.note.replace("\u2014 ", "\u2014 x") });
  rootFails({ ...honest, note: `${honest.note}\u2014 witness AAAA\n` });
  rootFails({ ...honest, leaves: [...honest.leaves, Uint8Array.of(0xff)] });
});

test("a log of another key is found when the key is pinned", () => {
  assert.equal(audit(honest, { logKey: Key.generate().publicKey }).failures[0]?.claim, "root");
});

const zeros = (length: number) => new Uint8Array(length);

for (const [name, claim, found] of [
  ["a salt", "seals", () => changed("evaluationOpened", (opened) => (opened.salt = zeros(32)))],
  ["a short salt", "seals", () => changed("evaluationOpened", (opened) => (opened.salt = zeros(1)))],
  ["a commit's signature", "envelopes", () => changed("submissionCommitted", (each) => (each.statement!.signature = zeros(64)))],
  ["a cut signature", "envelopes", () => changed("submissionCommitted", (each) => (each.statement!.signature = zeros(5)))],
  ["a key of no length", "envelopes", () => changed("membershipChanged", (each) => (each.statement!.publicKey = zeros(0)))],
  ["a payload's type", "envelopes", () => changed("submissionRevealed", (each) => (each.statement!.payloadType = "text/plain"))],
  ["a missing statement", "envelopes", () => changed("submissionCommitted", (each) => (each.statement = undefined))],
  ["a role", "envelopes", () => changed("membershipChanged", (each) => (each.role += 1))],
  ["a participant's key", "history", () => changed("participantRegistered", (each) => (each.publicKey = zeros(32)))],
  ["a seed", "draws", () => changed("draw", (receipt) => (receipt.seed = zeros(32)))],
  ["a pick", "draws", () => changed("draw", ({ picks }) => (picks[0]!.participant = picks[1]!.participant))],
  ["the order", "draws", () => changed("draw", ({ picks }) => picks.reverse())],
  ["a member twice", "draws", () => changed("draw", ({ picks }) => picks[0]!.members.push(picks[0]!.members[0]!))],
  ["a cut path", "draws", () => changed("draw", ({ picks }) => (picks[0]!.path = picks[0]!.path.slice(1)))],
  ["no picks", "draws", () => changed("draw", (receipt) => (receipt.picks = []))],
  ["an anchor", "draws", () => changed("draw", (receipt) => (receipt.anchor = zeros(32)))],
  ["a weight", "draws", () => changed("draw", ({ picks }) => (picks[0]!.groupWeight = picks[1]!.groupWeight.with(15, 1)))],
  ["a draw's signature", "draws", () => changed("draw", (receipt) => (receipt.signed!.signature = zeros(96)))],
  ["no signature", "draws", () => changed("draw", (receipt) => (receipt.signed = undefined))],
  ["a tolerance", "scores", () => changed("scoreConcluded", ({ score }) => (score!.tolerance = 3n))],
  ["an outlier", "scores", () => changed("scoreConcluded", ({ score }) => score!.outliers.push(score!.evaluations[0]!))],
  ["a count", "scores", () => changed("scoreConcluded", ({ score }) => (score!.correct += 1n))],
  ["an evaluation twice", "scores", () => changed("scoreConcluded", ({ score }) => (score!.evaluations[1] = score!.evaluations[0]!))],
] as const) {
  test(`a registry that changes ${name} is found at the leaf`, () => {
    const { record, index } = found();
    const failure = audit(record).failures.find((each) => each.claim !== "root");
    assert.equal(failure?.claim, claim, failure?.reason);
    assert.equal(failure?.index, index);
  });
}

test("a log without what the rest rests on is found", () => {
  for (const [kind, claim] of [
    ["genesis", "history"],
    ["participantRegistered", "envelopes"],
    ["verdict", "verdicts"],
    ["taskCreated", "history"],
    ["membershipChanged", "history"],
    ["submissionCommitted", "history"],
    ["submissionRevealed", "draws"],
    ["draw", "history"],
    ["assignmentChanged", "history"],
    ["evaluationSealed", "seals"],
    ["evaluationOpened", "scores"],
  ] as const) {
    assert.ok(audit(without(kind)).failures.some((each) => each.claim === claim), kind);
  }
});

test("a record's folder is byte for byte Python's, and holds nothing else", async () => {
  await writeRecord(honest, join(folder, "again"));
  for (const name of ["checkpoint", "leaves"]) {
    assert.deepEqual(await readFile(join(folder, "again", name)), await readFile(join(folder, "log", name)));
  }
  const packed = await readFile(join(folder, "log", "leaves"));
  for (const [name, files] of Object.entries({
    "without a checkpoint": { leaves: packed },
    "with more": { leaves: packed, checkpoint: honest.note, more: "" },
    "cut short": { leaves: packed.subarray(0, -1), checkpoint: honest.note },
    "cut in a length": { leaves: Buffer.concat([packed, Buffer.alloc(3)]), checkpoint: honest.note },
    "with a note that is no text": { leaves: packed, checkpoint: Buffer.of(0xff) },
  })) {
    await mkdir(join(folder, name));
    for (const [file, content] of Object.entries(files)) await writeFile(join(folder, name, file), content);
    await assert.rejects(readRecord(join(folder, name)), InvalidRecord, name);
  }
  const wrong = join(folder, "of something else");
  await mkdir(wrong);
  for (const name of ["a", "b", "c"]) await writeFile(join(wrong, name), "");
  await assert.rejects(readRecord(wrong), /is no exported record log: it holds no checkpoint and no leaves$/);
  for (const name of ["checkpoint", "leaves"]) await writeFile(join(wrong, name), "");
  await assert.rejects(readRecord(wrong), /holds a and 2 more, not checkpoint and leaves alone$/);
});
