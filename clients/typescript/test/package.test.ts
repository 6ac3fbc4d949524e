import assert from "node:assert/strict";
import { readFile, readdir } from "node:fs/promises";
import { test } from "node:test";

test("what the package imports, types included, is what it depends on", async () => {
  const root = new URL("../../", import.meta.url);
  const { dependencies } = JSON.parse(await readFile(new URL("package.json", root), "utf8")) as { dependencies: object };
  const imported = new Set<string>();
  for (const name of await readdir(new URL("dist/src/", root), { recursive: true })) {
    if (!/\.(js|d\.ts)$/.test(name)) continue;
    const text = await readFile(new URL(`dist/src/${name}`, root), "utf8");
    for (const [, scope = "", from = ""] of text.matchAll(/\bfrom "((?:@[^/"]+\/)?)([^."/][^"/]*)/g)) {
      if (!from.startsWith("node:")) imported.add(scope + from);
    }
  }
  assert.ok(imported.size > 3);
  assert.deepEqual([...imported].sort(), Object.keys(dependencies).sort());
});
