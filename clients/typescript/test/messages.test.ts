import assert from "node:assert/strict";
import { test } from "node:test";

import { Key, REPORT, openStatement } from "../src/index.js";
import { preAuthenticationEncoding } from "../src/identity.js";
import { readMessage } from "../src/messages.js";
import { EvaluationReport } from "../src/proto/tiltyard/type/v1/envelope.js";
import { Score } from "../src/proto/tiltyard/type/v1/evaluation.js";
import { LogEntry } from "../src/proto/tiltyard/type/v1/log.js";
import { ModelSpec } from "../src/proto/tiltyard/type/v1/model.js";
import { TaskConfig } from "../src/proto/tiltyard/type/v1/task.js";

const LATER = Uint8Array.of(0xa0, 6, 1); // field 100

function joined(...parts: Uint8Array[]): Uint8Array {
  return new Uint8Array(Buffer.concat(parts));
}

test("what a later version says in what is signed, hashed or compared is written again as it came", () => {
  const score = joined(Score.encode(Score.fromPartial({ correct: 7n, total: 10n, round: 1 })).finish(), LATER);
  assert.deepEqual(Score.encode(readMessage(Score, score)).finish(), score);
  const config = joined(TaskConfig.encode(TaskConfig.fromPartial({ field: "digits" })).finish(), LATER);
  assert.deepEqual(TaskConfig.encode(readMessage(TaskConfig, config)).finish(), config);
  const time = joined(Uint8Array.of(0x0a, 5, 8, 1), LATER); // within the time of an entry
  assert.deepEqual(LogEntry.encode(readMessage(LogEntry, time)).finish(), time);
});

test("bytes that may be read in two ways are refused", () => {
  for (const [name, bytes] of Object.entries({
    "counts twice": Uint8Array.of(0x2a, 2, 8, 5, 0x2a, 2, 0x10, 10),
    "a default value": Uint8Array.of(0x48, 0),
    "a number at length": Uint8Array.of(0x48, 0x81, 0),
    "a message that ends in another": Uint8Array.of(0x2a, 1, 8, 5),
    "a text that is no UTF-8": Uint8Array.of(0x0a, 1, 0xff),
    "a text cut short": Uint8Array.of(0x0a, 9, 0x61),
  })) {
    assert.throws(() => readMessage(EvaluationReport, bytes), Error, name);
  }
  const mark = Uint8Array.of(0x0a, 4, 0xef, 0xbb, 0xbf, 0x61); // a text may begin with U+FEFF
  assert.equal(readMessage(EvaluationReport, mark).origin, "\ufeffa");
});

test("a number below zero by its sign alone is no second way", () => {
  const spec = Uint8Array.of(0x25, 0, 0, 0, 0x80); // input_offset, -0
  assert.ok(Object.is(readMessage(ModelSpec, spec).inputOffset, -0));
});

test("a statement is opened in one way, and with what a later client says in it", () => {
  const key = Key.generate();
  const payloadType = "application/vnd.tiltyard.evaluation-report.v1+protobuf";
  const signed = (payload: Uint8Array) => {
    const signature = key.sign(preAuthenticationEncoding(payloadType, payload));
    return { payloadType, payload, signature, publicKey: key.publicKey };
  };
  const later = joined(EvaluationReport.encode(EvaluationReport.fromPartial({ detail: "x" })).finish(), LATER);
  const { statement } = openStatement(signed(later), REPORT);
  assert.deepEqual(EvaluationReport.encode(statement).finish(), later);
  const twice = Uint8Array.of(0x2a, 2, 8, 5, 0x2a, 2, 0x10, 10);
  assert.throws(() => openStatement(signed(twice), REPORT), /are not those/);
  const long = EvaluationReport.encode(EvaluationReport.fromPartial({ detail: "x".repeat(1 << 16) })).finish();
  assert.throws(() => openStatement(signed(long), REPORT), /at most 65536/);
});
