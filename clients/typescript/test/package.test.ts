import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile, readdir, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import * as imported from "../src/index.js";

const ROOT = new URL("../../", import.meta.url);

test("the package comes by require, too, and is the same", () => {
  // By its own name, as from outside.
  const required = createRequire(import.meta.url)("@tiltyard/client") as typeof imported;
  assert.equal(required.Client, imported.Client);
});

test("the example of the README compiles as strictly as can be, the package's own types included", async () => {
  const [, example = ""] = /```ts\n(.*?)```/s.exec(await readFile(new URL("README.md", ROOT), "utf8")) ?? [];
  assert.match(example, /@tiltyard\/client/);
  const file = fileURLToPath(new URL("dist/example.ts", ROOT));
  await writeFile(file, example);
  const strictly = ["--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess", "--verbatimModuleSyntax"];
  const target = ["--module", "NodeNext", "--target", "ES2022", "--lib", "ES2023,ESNext.Disposable", "--types", "node"];
  try {
    const compiler = fileURLToPath(new URL("node_modules/typescript/bin/tsc", ROOT));
    const options = { cwd: fileURLToPath(ROOT) };
    await promisify(execFile)(process.execPath, [compiler, "--noEmit", ...strictly, ...target, file], options);
  } catch (error) {
    assert.fail((error as { stdout: string }).stdout);
  } finally {
    await rm(file);
  }
});

test("what the package imports, types included, is what it depends on", async () => {
  const { dependencies } = JSON.parse(await readFile(new URL("package.json", ROOT), "utf8")) as { dependencies: object };
  const names = new Set<string>();
  for (const name of await readdir(new URL("dist/src/", ROOT), { recursive: true })) {
    if (!/\.(js|d\.ts)$/.test(name)) continue;
    const text = await readFile(new URL(`dist/src/${name}`, ROOT), "utf8");
    for (const [, scope = "", from = ""] of text.matchAll(/\bfrom "((?:@[^/"]+\/)?)([^."/][^"/]*)/g)) {
      if (!from.startsWith("node:")) names.add(scope + from);
    }
  }
  assert.ok(names.size > 3);
  assert.deepEqual([...names].sort(), Object.keys(dependencies).sort());
});
