import assert from "node:assert/strict";
import { test } from "node:test";

import { conclude } from "../src/scoring.js";
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
