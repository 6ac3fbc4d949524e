/** Artifacts up and down in chunks; what broke is resumed, and no byte is trusted before its SHA-256 has been checked. */

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdir, open, rename, rm, stat, truncate } from "node:fs/promises";
import { dirname } from "node:path";

import { toHex } from "./bytes.js";
import { shared } from "./calling.js";
import type { Client } from "./client.js";
import { ArenaError } from "./errors.js";
import type { DeepPartial, UploadArtifactRequest } from "./proto/tiltyard/registry/v1/artifact.js";
import { LONGEST_SILENCE_MS, Silence } from "./silence.js";
import { PATIENCE_MS, pause, persist } from "./watching.js";

const CHUNK_BYTES = 512 * 1024;
const FIRST_WAIT_MS = 100;
const LONGEST_WAIT_MS = 2_000;

/** Called with the bytes moved so far and the bytes in all. */
export type Progress = (moved: bigint, total: bigint) => void;

/**
 * What an uploaded file is for: the D_eval or holdout of a task, or the model of a submission (resource names); or a base
 * model for a task to name.
 */
export type Purpose =
  | { $case: "task"; value: string }
  | { $case: "submission"; value: string }
  | { $case: "baseModel"; value: true };

/** Who hears of a transfer, and what ends it before: an aborted signal throws its AbortError. */
export interface TransferOptions {
  progress?: Progress;
  signal?: AbortSignal;
}

/** The bytes that arrived are not those that the artifact's name promises; they have been deleted. */
export class DigestMismatch extends Error {
  override readonly name = "DigestMismatch";
}

/** SHA-256 of a file, 32 bytes. */
export async function fileDigest(path: string, signal?: AbortSignal): Promise<Uint8Array> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path, { signal: shared(signal) })) hash.update(chunk as Buffer);
  return new Uint8Array(hash.digest());
}

/**
 * Uploads a file and returns its artifact's name; a stream that breaks goes on where the server says that it is.
 *
 * `digest` is the file's SHA-256 where it is known already.
 */
export async function upload(
  client: Client,
  path: string,
  purpose: Purpose,
  { progress, signal, digest }: TransferOptions & { digest?: Uint8Array } = {},
): Promise<string> {
  const artifact = `artifacts/${toHex(digest ?? (await fileDigest(path, signal)))}`;
  const sizeBytes = BigInt((await stat(path)).size);
  const patience = new Patience();
  let broken: unknown;
  for (;;) {
    const at = await persist(() => client.artifacts.getUpload({ artifact }, { signal }), { signal });
    // A complete artifact still has to be claimed for this purpose: a header with no bytes left to send.
    const offset = at.complete ? sizeBytes : at.offset;
    patience.movedTo(offset);
    // Asked only now: the stream that broke may have brought something for hours.
    if (broken !== undefined && patience.isOver(0)) throw broken;
    let leastMs: number;
    try {
      const header = { artifact, sizeBytes, offset, purpose };
      await client.artifacts.uploadArtifact(messages(path, header, progress), { signal });
      progress?.(sizeBytes, sizeBytes);
      return artifact;
    } catch (error) {
      leastMs = leastPauseMs(error);
      if (!mayGoOn(error) || leastMs > PATIENCE_MS) throw error;
      broken = error;
    }
    await patience.pause(leastMs, signal);
  }
}

/**
 * Downloads an artifact to `destination`, which appears whole or not at all.
 *
 * The bytes so far lie in `destination.part`, also after a crash, and the next call goes on from there; where they turn out
 * to be of another artifact it begins anew. Throws DigestMismatch when the bytes are not those of the name.
 */
export async function download(
  client: Client,
  artifact: string,
  destination: string,
  options: TransferOptions = {},
): Promise<void> {
  const { signal } = options;
  const part = `${destination}.part`;
  await mkdir(dirname(destination), { recursive: true });
  const known = await persist(() => client.artifacts.getArtifact({ name: artifact }, { signal }), { signal });
  const total = known.artifact?.sizeBytes ?? 0n;
  const isWhole = async () => toHex(await fileDigest(part, signal)) === artifact.replace("artifacts/", "");
  const found = await bytesSoFar(part, total);
  await fetchAll(client, artifact, part, total, options);
  let whole = await isWhole();
  if (found && !whole) {
    await truncate(part);
    await fetchAll(client, artifact, part, total, options);
    whole = await isWhole();
  }
  if (!whole) {
    await rm(part);
    throw new DigestMismatch(`the bytes received are not those of ${artifact}`);
  }
  await rename(part, destination);
}

async function fetchAll(
  client: Client,
  artifact: string,
  part: string,
  total: bigint,
  options: TransferOptions,
): Promise<void> {
  const patience = new Patience();
  for (let offset = await bytesSoFar(part, total); offset < total; ) {
    let leastMs = 0;
    let broken: unknown;
    try {
      await fetchInto(client, artifact, part, offset, total, options);
    } catch (error) {
      if (!(error instanceof ArenaError) || !error.isTransient) throw error;
      [broken, leastMs] = [error, leastPauseMs(error)];
    }
    offset = await bytesSoFar(part, total);
    patience.movedTo(offset);
    if (offset < total) {
      if (patience.isOver(leastMs)) throw broken ?? new DigestMismatch(`${artifact} ends after ${offset} of ${total} bytes`);
      await patience.pause(leastMs, options.signal);
    }
  }
}

async function* messages(
  path: string,
  header: { artifact: string; sizeBytes: bigint; offset: bigint; purpose: Purpose },
  progress: Progress | undefined,
): AsyncGenerator<DeepPartial<UploadArtifactRequest>, void, undefined> {
  yield { content: { $case: "header", value: header } };
  let position = header.offset;
  if (position === header.sizeBytes) return;
  const file = createReadStream(path, { start: Number(position), highWaterMark: CHUNK_BYTES });
  for await (const chunk of file as AsyncIterable<Buffer>) {
    yield { content: { $case: "chunk", value: chunk } };
    position += BigInt(chunk.length);
    progress?.(position, header.sizeBytes);
  }
}

async function fetchInto(
  client: Client,
  name: string,
  part: string,
  offset: bigint,
  total: bigint,
  { progress, signal }: TransferOptions,
): Promise<void> {
  const file = await open(part, "a");
  try {
    let position = offset;
    const silence = new Silence(LONGEST_SILENCE_MS, signal);
    const chunks = client.artifacts.downloadArtifact({ name, offset }, { signal: silence.options.signal });
    for await (const { chunk } of silence.heard(chunks)) {
      position += BigInt(chunk.length);
      if (position > total) {
        await rm(part);
        throw new DigestMismatch(`${name} is longer than its ${total} bytes`);
      }
      await file.appendFile(chunk);
      progress?.(position, total);
    }
    await file.sync();
  } finally {
    await file.close();
  }
}

async function bytesSoFar(part: string, total: bigint): Promise<bigint> {
  await (await open(part, "a")).close();
  const size = BigInt((await stat(part)).size);
  if (size <= total) return size;
  // More than there can be: the part of another artifact.
  await truncate(part);
  return 0n;
}

function mayGoOn(error: unknown): boolean {
  if (!(error instanceof ArenaError)) return false;
  // Another stream of ours has not ended yet, or was still ending when the server said where it is.
  return error.isTransient || ["UPLOAD_RUNNING", "WRONG_OFFSET"].includes(error.reason);
}

/** The wait that a server named with an error, 0 where it named none. */
function leastPauseMs(error: unknown): number {
  return error instanceof ArenaError ? (error.leastPauseMs ?? 0) : 0;
}

/** How long to go on without getting further, and how long to pause in between. */
class Patience {
  #position = -1n;
  #waitMs = FIRST_WAIT_MS;
  #giveUpAt = performance.now() + PATIENCE_MS;

  movedTo(position: bigint): void {
    if (position <= this.#position) return;
    this.#position = position;
    this.#waitMs = FIRST_WAIT_MS;
    this.#giveUpAt = performance.now() + PATIENCE_MS;
  }

  isOver(leastMs: number): boolean {
    return performance.now() + Math.max(this.#waitMs, leastMs) > this.#giveUpAt;
  }

  async pause(leastMs: number, signal: AbortSignal | undefined): Promise<void> {
    await pause(Math.max(this.#waitMs, leastMs), signal);
    this.#waitMs = Math.min(2 * this.#waitMs, LONGEST_WAIT_MS);
  }
}
