import assert from "node:assert/strict";
import { test } from "node:test";

import { conclude, wilsonInterval } from "../src/scoring.js";
import { vectors } from "./vectors.js";

interface Case {
  name: string;
  reports: { validator: string; correct?: number; total?: number; ambiguous?: number; fault?: string; node_endpoint?: boolean }[];
  k: number;
  task_tolerance: number;
  disputed: boolean;
  expected: Record<string, unknown>;
}

test("reports are concluded as in the vectors", () => {
  let concluded = 0;
  for (const { name, reports, k, task_tolerance, expected } of vectors<{ cases: Case[] }>("scoring.json").cases) {
    if ("reserves_wanted" in expected) continue; // asked before a conclusion, by the registry
    const votes = reports
      .filter(({ node_endpoint }) => !node_endpoint)
      .map(({ validator, fault, correct = 0, total = 0, ambiguous = 0 }) =>
        fault === undefined
          ? { validator, counts: { correct: BigInt(correct), total: BigInt(total), ambiguous: BigInt(ambiguous) } }
          : { validator, fault },
      );
    if ("error" in expected) {
      assert.throws(() => conclude(votes, k, BigInt(task_tolerance)), RangeError, name);
      continue;
    }
    const found = conclude(votes, k, BigInt(task_tolerance));
    const told = { ...found, correct: Number(found.correct), total: Number(found.total), tolerance: Number(found.tolerance) };
    for (const [what, value] of Object.entries(expected)) {
      assert.deepEqual(told[what as keyof typeof told], value, `${name}: ${what}`);
    }
    concluded += 1;
  }
  assert.ok(concluded >= 10);
});

test("the interval of a share is Wilson's", () => {
  const { low, high } = wilsonInterval(8n, 10n);
  assert.ok(Math.abs(low - 0.4901624715) < 1e-9 && Math.abs(high - 0.9433178485) < 1e-9, `${low} ${high}`);
  assert.equal(wilsonInterval(0n, 7n).low, 0);
  assert.equal(wilsonInterval(7n, 7n).high, 1);
  for (const [correct, total] of [[-1n, 7n], [8n, 7n], [0n, 0n]] as const) {
    assert.throws(() => wilsonInterval(correct, total), RangeError);
  }
});
