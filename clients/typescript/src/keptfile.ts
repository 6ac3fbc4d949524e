/** Files that must outlive the process: written whole or not at all, also through a crash. */

import { randomBytes } from "node:crypto";
import { link, open, rename, rm } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

/** Puts `text` in the place of the file at `path`; it is on the disk when this resolves. A new file gets `mode`. */
export async function replaceFile(path: string, text: string, mode = 0o666): Promise<void> {
  const draft = draftOf(path);
  try {
    await writeThrough(draft, text, mode);
    await rename(draft, path);
  } finally {
    await rm(draft, { force: true });
  }
  await syncFolder(dirname(path));
}

/** Writes a new file in the same way; fails with EEXIST where one is. */
export async function createFile(path: string, text: string, mode: number): Promise<void> {
  const draft = draftOf(path);
  try {
    await writeThrough(draft, text, mode);
    // A link, unlike a rename, fails where a file is there already.
    await link(draft, path);
  } finally {
    await rm(draft, { force: true });
  }
  await syncFolder(dirname(path));
}

/** Beside the file, under a name of its own: two processes may write at once. */
function draftOf(path: string): string {
  return join(dirname(path), `.${basename(path)}.${randomBytes(8).toString("hex")}`);
}

async function writeThrough(path: string, text: string, mode: number): Promise<void> {
  const file = await open(path, "wx", mode);
  try {
    await file.writeFile(text);
    await file.sync();
  } finally {
    await file.close();
  }
}

async function syncFolder(path: string): Promise<void> {
  if (process.platform === "win32") return; // a folder can't be opened there
  const folder = await open(path, "r");
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

/** The text of a file; undefined where there is none. */
export async function readIfThere(path: string): Promise<string | undefined> {
  try {
    const file = await open(path, "r");
    try {
      return await file.readFile("utf8");
    } finally {
      await file.close();
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}
