/**
 * A witness of a record log: it remembers what it has seen, checks that the log only grows, and cosigns.
 *
 * Its folder is that of `tiltyard log watch`: `witness.pem` (its key), `witness.pub` (its verifier key), `frontier.json` (the
 * tree that it has seen), one cosigned note for each size under `checkpoints/`, and what it has found wrong under `alarms/`.
 */

import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";

import { equal, fromHex, toHex } from "./bytes.js";
import { WitnessKey, cosign, verifyCosignature } from "./cosigning.js";
import { Key } from "./identity.js";
import { readIfThere, replaceFile } from "./keptfile.js";
import { InvalidRecord, readLeaf, type LogSource } from "./recordlog.js";
import { Frontier, InvalidNote, leafHash, openCheckpoint, verifyConsistency, type Checkpoint } from "./transparency.js";

/** A log that has rewritten its history, or shows two of them. */
export class Alarm extends Error {
  override readonly name = "Alarm";
}

/** The log at the size that a witness has seen last. */
export interface Seen {
  origin: string;
  logKey: Uint8Array;
  frontier: Frontier;
}

/** What a witness says of a log: how far it has seen it, and when (seconds since 1970). */
export interface Testimony {
  name: string;
  size: bigint;
  timeS: bigint;
}

/** One folder's witness. It trusts the log key that it has seen first. */
export class Witness {
  private constructor(
    private readonly folder: string,
    private readonly key: Key,
    /** Whose cosignatures are its own. */
    readonly verifier: WitnessKey,
  ) {}

  /** The witness of a folder, which is made where there is none; `name` is a new one's. Throws RangeError for a bad name. */
  static async open(folder: string, name?: string): Promise<Witness> {
    for (const each of ["checkpoints", "alarms"]) await mkdir(join(folder, each), { recursive: true });
    const [keyFile, publicFile] = [join(folder, "witness.pem"), join(folder, "witness.pub")];
    const named = await readIfThere(publicFile);
    const isNew = (await readIfThere(keyFile)) === undefined;
    const key = isNew ? Key.generate() : await Key.load(keyFile);
    const fresh = () => new WitnessKey(name ?? `witness-${key.id.slice(0, 12)}`, key.publicKey);
    const verifier = named === undefined ? fresh() : WitnessKey.parse(named);
    if (isNew) await key.save(keyFile);
    if (named === undefined) await replaceFile(publicFile, `${verifier}\n`);
    return new Witness(folder, key, verifier);
  }

  /** What is remembered; undefined before the first look. Throws RangeError for a file that was damaged. */
  async seen(): Promise<Seen | undefined> {
    const file = join(this.folder, "frontier.json");
    const text = await readIfThere(file);
    if (text === undefined) return undefined;
    try {
      const kept = JSON.parse(text) as { origin: string; log_key: string; size: number; hashes: string[] };
      const frontier = new Frontier(BigInt(kept.size), kept.hashes.map(fromHex));
      return { origin: kept.origin, logKey: fromHex(kept.log_key), frontier };
    } catch (error) {
      throw new RangeError(`${file} is damaged: ${String(error)}`, { cause: error });
    }
  }

  /**
   * Looks at the log once: its signature, that it has grown from what was seen, and that its new leaves give its root. Then
   * cosigns. Throws Alarm, with both notes kept, InvalidNote, and RangeError as `seen` does.
   */
  async look(source: LogSource, nowS: number = Math.floor(Date.now() / 1000)): Promise<Checkpoint> {
    // First, since it says at once whether the registry is there.
    const note = await source.note();
    const seen = (await this.seen()) ?? (await begin(source));
    const checkpoint = openCheckpoint(note, { name: seen.origin, publicKey: seen.logKey });
    const { frontier } = seen;
    const [before, now] = [frontier.size, checkpoint.size];
    if (now < before) await this.#alarm(note, `the log had ${before} leaves and shows ${now}: leaves are gone`);
    if (before > 0n) {
      const path = await source.consistency(before, now);
      const roots = { oldRoot: frontier.root(), newRoot: checkpoint.root };
      if (!verifyConsistency({ oldSize: before, newSize: now, path, ...roots })) {
        await this.#alarm(note, `the log of ${now} leaves does not begin with the ${before} seen`);
      }
    }
    try {
      for await (const leaf of source.leaves(before, now)) frontier.append(leafHash(leaf));
    } catch (error) {
      if (!(error instanceof InvalidRecord)) throw error;
      await this.#alarm(note, error.message);
    }
    if (frontier.size !== now || !equal(frontier.root(), checkpoint.root)) {
      await this.#alarm(note, `the leaves that the log shows up to ${now} do not give its root`);
    }
    await this.#keep(note, seen, nowS);
    return checkpoint;
  }

  /** Holds a checkpoint that somebody else was shown against this log. Throws Alarm for another history, and InvalidNote. */
  async compare(source: LogSource, other: string): Promise<Checkpoint> {
    const seen = await this.seen();
    if (!seen) throw new InvalidNote("this witness has not looked at the log yet");
    const theirs = openCheckpoint(other, { name: seen.origin, publicKey: seen.logKey });
    const ours = { size: seen.frontier.size, root: seen.frontier.root() };
    if (theirs.size > ours.size) {
      // It may have grown since it was looked at.
      const { size } = openCheckpoint(await source.note(), { name: seen.origin, publicKey: seen.logKey });
      if (theirs.size > size) await this.#alarm(other, `the log has signed ${theirs.size} leaves and shows ${size}`);
    }
    const [old, now] = theirs.size > ours.size ? [ours, theirs] : [theirs, ours];
    const [oldSize, newSize] = [old.size, now.size];
    const path = oldSize === newSize ? [] : await source.consistency(oldSize, newSize);
    if (!verifyConsistency({ oldSize, newSize, path, oldRoot: old.root, newRoot: now.root })) {
      await this.#alarm(other, `the log has signed two histories: one of ${oldSize} and one of ${newSize} leaves`);
    }
    return theirs;
  }

  async #keep(note: string, { origin, logKey, frontier }: Seen, nowS: number): Promise<void> {
    const file = this.#checkpointFile(frontier.size);
    if ((await readIfThere(file)) === undefined) {
      await replaceFile(file, cosign(note, this.key, this.verifier.name, nowS));
    }
    const hashes = frontier.hashes.map(toHex);
    const kept = { origin, log_key: toHex(logKey), size: Number(frontier.size), hashes };
    await replaceFile(join(this.folder, "frontier.json"), `${JSON.stringify(kept)}\n`);
  }

  async #alarm(note: string, reason: string): Promise<never> {
    const seen = await this.seen();
    const before = (await readIfThere(this.#checkpointFile(seen?.frontier.size ?? 0n))) ?? "";
    const count = (await readdir(join(this.folder, "alarms"))).length;
    const evidence = `${reason}\n\nseen before:\n${before}\nshown now:\n${note}`;
    await replaceFile(join(this.folder, "alarms", `${String(count + 1).padStart(6, "0")}.txt`), evidence);
    throw new Alarm(reason);
  }

  #checkpointFile(size: bigint): string {
    return join(this.folder, "checkpoints", String(size).padStart(12, "0"));
  }
}

/**
 * The newest cosigned checkpoint in a witness's folder that is not beyond these leaves; undefined where there is none.
 *
 * Throws Alarm when the leaves give another root than the one that was cosigned, with the leaves among which the difference
 * lies; InvalidNote.
 */
export async function witnessed(
  folder: string,
  leaves: readonly Uint8Array[],
  log: { origin: string; logKey: Uint8Array },
): Promise<Testimony | undefined> {
  const witness = WitnessKey.parse(await readFile(join(folder, "witness.pub"), "utf8"));
  const frontier = new Frontier();
  let known: Testimony | undefined;
  const files = (await readdir(join(folder, "checkpoints"))).filter((name) => /^[0-9]/.test(name)).sort();
  for (const name of files) {
    const note = await readFile(join(folder, "checkpoints", name), "utf8");
    const checkpoint = openCheckpoint(note, { name: log.origin, publicKey: log.logKey });
    const timeS = verifyCosignature(note, witness);
    if (checkpoint.size > BigInt(leaves.length)) break;
    const begin = Number(frontier.size);
    for (const leaf of leaves.slice(begin, Number(checkpoint.size))) frontier.append(leafHash(leaf));
    if (!equal(frontier.root(), checkpoint.root)) {
      const range = `a leaf from ${begin} to ${checkpoint.size - 1n} was changed`;
      throw new Alarm(`${witness.name} saw another history: ${range}`);
    }
    known = { name: witness.name, size: checkpoint.size, timeS };
  }
  return known;
}

/** The first look: the genesis names the log's key. Throws InvalidNote: there is no log yet that could have lied. */
async function begin(source: LogSource): Promise<Seen> {
  try {
    for await (const leaf of source.leaves(0n, 1n)) {
      const { entry } = readLeaf(leaf, 0);
      if (entry?.$case === "genesis" && entry.value.origin) {
        return { origin: entry.value.origin, logKey: entry.value.logKey, frontier: new Frontier() };
      }
    }
  } catch (error) {
    if (!(error instanceof InvalidRecord)) throw error;
    throw new InvalidNote(error.message, { cause: error });
  }
  throw new InvalidNote("leaf 0 is not the genesis");
}
