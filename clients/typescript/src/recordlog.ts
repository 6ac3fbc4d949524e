/** A record log read from its registry, and the folder that keeps one: `checkpoint` and `leaves`, as `tiltyard log export` does. */

import { mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";

import { bigEndian } from "./bytes.js";
import type { Client } from "./client.js";
import { readMessage } from "./messages.js";
import type { Checkpoint } from "./proto/tiltyard/registry/v1/log.js";
import { LogEntry } from "./proto/tiltyard/type/v1/log.js";
import { persist, type Patient } from "./watching.js";

const CHECKPOINT_FILE = "checkpoint";
const LEAVES_FILE = "leaves";
const LENGTH_BYTES = 4;
const PAGE = 1000;

/** What was read is no record log. */
export class InvalidRecord extends Error {
  override readonly name = "InvalidRecord";
}

/** A log as it was downloaded: a signed note over the tree, and the leaves in order as they were hashed. */
export interface RecordLog {
  note: string;
  leaves: readonly Uint8Array[];
}

/** Where a log is read from. */
export interface LogSource {
  /** The present checkpoint, a signed note. */
  note(): Promise<string>;
  /** Leaves from `start` until before `end`, as they were hashed. */
  leaves(start: bigint, end: bigint): AsyncIterable<Uint8Array>;
  /** The proof that one size is a beginning of the other. */
  consistency(oldSize: bigint, newSize: bigint): Promise<readonly Uint8Array[]>;
}

/** The log of the registry that a client is connected to. */
export class RegistryLog implements LogSource {
  constructor(
    private readonly client: Client,
    private readonly patient: Patient = {},
  ) {}

  async note(): Promise<string> {
    return (await this.checkpoint()).note;
  }

  /** The present checkpoint. */
  async checkpoint(): Promise<Checkpoint> {
    const { signal } = this.patient;
    const { checkpoint } = await persist(() => this.client.log.getCheckpoint({}, { signal }), this.patient);
    if (!checkpoint) throw new InvalidRecord("the registry answered without a checkpoint");
    return checkpoint;
  }

  /** Throws InvalidRecord when the registry has fewer, or shows others. */
  async *leaves(start: bigint, end: bigint): AsyncGenerator<Uint8Array, void, undefined> {
    const { signal } = this.patient;
    for (let next = start; next < end; ) {
      const pageSize = end - next < PAGE ? Number(end - next) : PAGE;
      const asked = { startIndex: next, pageSize };
      const { leaves } = await persist(() => this.client.log.listEntries(asked, { signal }), this.patient);
      if (leaves.length === 0 || leaves.length > pageSize) {
        throw new InvalidRecord(`the registry signed ${end} leaves and does not show leaf ${next}`);
      }
      for (const { index, entry } of leaves) {
        if (index !== next) throw new InvalidRecord(`the registry signed ${end} leaves and does not show leaf ${next}`);
        yield entry;
        next += 1n;
      }
    }
  }

  async consistency(oldSize: bigint, newSize: bigint): Promise<readonly Uint8Array[]> {
    const { signal } = this.patient;
    return (await persist(() => this.client.log.getConsistencyProof({ oldSize, newSize }, { signal }), this.patient)).path;
  }
}

/** The whole log up to the present checkpoint. Throws InvalidRecord, ArenaError. */
export async function fetchRecord(client: Client, patient: Patient = {}): Promise<RecordLog> {
  const log = new RegistryLog(client, patient);
  const { note, size } = await log.checkpoint();
  const leaves: Uint8Array[] = [];
  for await (const leaf of log.leaves(0n, size)) leaves.push(leaf);
  return { note, leaves };
}

/** Writes `checkpoint`, the note as it came, and `leaves`, each after its length in four big-endian bytes. */
export async function writeRecord(record: RecordLog, folder: string): Promise<void> {
  await mkdir(folder, { recursive: true });
  const packed = record.leaves.flatMap((leaf) => [bigEndian(leaf.length, LENGTH_BYTES), leaf]);
  await writeFile(join(folder, LEAVES_FILE), packed);
  await writeFile(join(folder, CHECKPOINT_FILE), record.note);
}

/** Reads what `writeRecord` wrote. Throws InvalidRecord for any other file or byte, and what the file system says. */
export async function readRecord(folder: string): Promise<RecordLog> {
  const wanted = [CHECKPOINT_FILE, LEAVES_FILE];
  const names = (await readdir(folder)).sort();
  const missing = wanted.filter((name) => !names.includes(name));
  if (missing.length > 0) {
    throw new InvalidRecord(`${folder} is no exported record log: it holds no ${missing.join(" and no ")}`);
  }
  const others = names.filter((name) => !wanted.includes(name));
  if (others.length > 0) {
    const more = others.length > 1 ? ` and ${others.length - 1} more` : "";
    throw new InvalidRecord(`${folder} holds ${others[0]}${more}, not checkpoint and leaves alone`);
  }
  const text = await readFile(join(folder, CHECKPOINT_FILE));
  const note = text.toString("utf8");
  if (!Buffer.from(note).equals(text)) throw new InvalidRecord("the checkpoint is not UTF-8 text");
  return { note, leaves: unpackLeaves(await readFile(join(folder, LEAVES_FILE))) };
}

/** What a leaf says. Throws InvalidRecord, naming it, when it is no entry. */
export function readLeaf(leaf: Uint8Array, index: number): LogEntry {
  try {
    return readMessage(LogEntry, leaf);
  } catch (error) {
    throw new InvalidRecord(`leaf ${index} is not a LogEntry: ${error instanceof Error ? error.message : String(error)}`, { cause: error });
  }
}

function unpackLeaves(packed: Buffer): Uint8Array[] {
  const leaves: Uint8Array[] = [];
  for (let at = 0; at < packed.length; ) {
    const begin = at + LENGTH_BYTES;
    const end = begin <= packed.length ? begin + packed.readUInt32BE(at) : Infinity;
    if (end > packed.length) throw new InvalidRecord(`leaf ${leaves.length} is cut short`);
    leaves.push(new Uint8Array(packed.subarray(begin, end)));
    at = end;
  }
  return leaves;
}
