/** The vectors that implementations in every language share: tests/vectors of the repository. */

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

/** The vectors in one file; compiled tests lie in dist/test. */
export function vectors<T>(name: string): T {
  const path = new URL(`../../../../tests/vectors/${name}`, import.meta.url);
  return JSON.parse(readFileSync(fileURLToPath(path), "utf8")) as T;
}
