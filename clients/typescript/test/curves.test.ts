import assert from "node:assert/strict";
import { test } from "node:test";

import { weight, type Curve } from "../src/curves.js";
import { vectors } from "./vectors.js";

interface Weight {
  curve: Curve["kind"];
  alpha_millis: number;
  stake_micros: string;
  minimum_micros: string;
  weight: string;
}

test("stakes weigh what the vectors say", () => {
  const { weights } = vectors<{ weights: Weight[] }>("curves.json");
  for (const each of weights) {
    const curve = { kind: each.curve, alphaMillis: each.alpha_millis };
    const found = weight(BigInt(each.stake_micros), { minimumMicros: BigInt(each.minimum_micros), curve });
    assert.equal(String(found), each.weight, JSON.stringify(each));
  }
  assert.ok(weights.length > 100);
});

test("what weighs nothing, or is no curve, is refused", () => {
  const curve: Curve = { kind: "power", alphaMillis: 500 };
  assert.throws(() => weight(-1n, { minimumMicros: 1n, curve }), RangeError);
  assert.throws(() => weight(1n, { minimumMicros: 0n, curve }), RangeError);
  for (const [kind, alphaMillis] of [["power", 0], ["power", 1000], ["log", 1], ["logistic", 500]] as const) {
    assert.throws(() => weight(1n, { minimumMicros: 1n, curve: { kind, alphaMillis } }), RangeError, kind);
  }
});
