/** The journal of one submission: the file without which a commitment can never be opened. Python's client has the same. */

import { randomBytes } from "node:crypto";
import { mkdir, readFile } from "node:fs/promises";
import { dirname } from "node:path";

import { toHex } from "./bytes.js";
import { newRequestId } from "./calling.js";
import { SALT_BYTES } from "./commitments.js";
import { createFile, readIfThere, replaceFile } from "./keptfile.js";
import type { ModelFormat } from "./proto/tiltyard/type/v1/model.js";

/** What a submission is of, by which a journal is known again. */
export interface Submitted {
  readonly origin: string;
  readonly task: string;
  readonly participant: string;
  /** SHA-256 of the model's file, in hex. */
  readonly modelDigest: string;
  readonly modelIndex: number;
  readonly modelFormat: ModelFormat;
}

/** What must be known to go on with one submission; digest and salt are 32 bytes in hex. */
export interface Journal extends Submitted {
  readonly salt: string;
  readonly commitRequestId: string;
  readonly revealRequestId: string;
  /** The submission's name once the registry has answered, empty before. */
  readonly submission: string;
  readonly revealed: boolean;
}

/** The journal is of another submission: another arena, task, key or model. */
export class JournalMismatch extends Error {
  override readonly name = "JournalMismatch";
}

// In the file's order: its names are those of Python's client.
const NAMES = {
  origin: "origin",
  task: "task",
  participant: "participant",
  modelDigest: "model_digest",
  modelIndex: "model_index",
  modelFormat: "model_format",
  salt: "salt",
  commitRequestId: "commit_request_id",
  revealRequestId: "reveal_request_id",
  submission: "submission",
  revealed: "revealed",
} as const satisfies Record<keyof Journal, string>;

const KNOWN_BY = ["origin", "task", "participant", "modelDigest"] as const;
/** The commitment says nothing of these two, and a reveal that did and was refused is none. */
const REVEALED_AS = ["modelIndex", "modelFormat"] as const;

/** The journal in a file. Throws the file system's error where there is none, JournalMismatch for a file that is no journal. */
export async function readJournal(path: string): Promise<Journal> {
  return parse(path, await readFile(path, "utf8"));
}

/**
 * The journal as it lies in the file, with what the reveal is to say from `submitted`, or a fresh one; on the disk before it
 * is returned. Throws JournalMismatch.
 */
export async function beginJournal(path: string, submitted: Submitted): Promise<Journal> {
  let text = await readIfThere(path);
  if (text === undefined) {
    const fresh: Journal = {
      ...submitted,
      salt: toHex(randomBytes(SALT_BYTES)),
      commitRequestId: newRequestId(),
      revealRequestId: newRequestId(),
      submission: "",
      revealed: false,
    };
    await mkdir(dirname(path), { recursive: true });
    try {
      await createFile(path, written(fresh), 0o600);
      return fresh;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
      // Another process has begun meanwhile: both go on with its salt.
      text = await readFile(path, "utf8");
    }
  }
  const found = parse(path, text);
  const differs = (name: keyof Submitted) => found[name] !== submitted[name];
  const other = [...KNOWN_BY, ...(found.revealed ? REVEALED_AS : [])].find(differs);
  if (other !== undefined) {
    const known = `${path} is of another submission: its ${NAMES[other]} is ${JSON.stringify(found[other])}`;
    throw new JournalMismatch(`${known}; name another journal to submit anew`);
  }
  if (!REVEALED_AS.some(differs)) return found;
  const mended: Journal = { ...found, ...submitted, revealRequestId: newRequestId() };
  await writeJournal(path, mended);
  return mended;
}

/** Puts the journal in the place of the file, readable by nobody else. */
export async function writeJournal(path: string, journal: Journal): Promise<void> {
  await replaceFile(path, written(journal), 0o600);
}

function written(journal: Journal): string {
  const document = Object.entries(NAMES).map(([name, inFile]) => [inFile, journal[name as keyof Journal]]);
  return JSON.stringify(Object.fromEntries(document), null, 1);
}

function parse(path: string, text: string): Journal {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new JournalMismatch(`${path} is not the journal of a submission`, { cause: error });
  }
  const values = { submission: "", revealed: false, ...(document as Record<string, unknown> | null) };
  const journal: Record<string, unknown> = {};
  for (const [name, inFile] of Object.entries(NAMES)) {
    const value = (values as Record<string, unknown>)[inFile];
    const kind = name === "revealed" ? "boolean" : name === "modelIndex" || name === "modelFormat" ? "number" : "string";
    if (typeof value !== kind) throw new JournalMismatch(`${path} is not the journal of a submission`);
    journal[name] = value;
  }
  if (Object.keys(values).length !== Object.keys(NAMES).length) {
    throw new JournalMismatch(`${path} is not the journal of a submission`);
  }
  return journal as unknown as Journal;
}
