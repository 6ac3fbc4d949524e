/** Files that must outlive the process: written whole or not at all, also through a crash. */

import { open, rename } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

/** Puts `text` in the place of the file at `path`; it is on the disk when this resolves. A new file gets `mode`. */
export async function replaceFile(path: string, text: string, mode = 0o666): Promise<void> {
  const draft = join(dirname(path), `.${basename(path)}.draft`);
  const file = await open(draft, "w", mode);
  try {
    await file.writeFile(text);
    await file.sync();
  } finally {
    await file.close();
  }
  await rename(draft, path);
  if (process.platform === "win32") return; // a folder can't be opened there
  const folder = await open(dirname(path), "r");
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
