/** Python's client, for what both must read and write alike: of the repository's environment, or beside TILTYARD_BIN. */

import { execFile } from "node:child_process";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

/** The `tiltyard` command. */
export const TILTYARD =
  process.env["TILTYARD_BIN"] ?? fileURLToPath(new URL("../../../../.venv/bin/tiltyard", import.meta.url));

const REPOSITORY = fileURLToPath(new URL("../../../../", import.meta.url));

/** What a script prints; `args` are its `sys.argv[1:]`. Throws with what it wrote to stderr when it fails. */
export async function python(script: string, ...args: string[]): Promise<string> {
  return run(join(dirname(TILTYARD), "python"), "-c", script, ...args);
}

/** What the `tiltyard` command prints. Throws with what it wrote to stderr when it fails. */
export async function tiltyard(...args: string[]): Promise<string> {
  return run(TILTYARD, ...args);
}

async function run(command: string, ...args: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)(command, args, { cwd: REPOSITORY });
  return stdout.trim();
}
