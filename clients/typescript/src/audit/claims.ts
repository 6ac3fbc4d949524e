/** The audit of a record: what is claimed, how often it was checked, and where it does not hold (docs/transparency.md). */

import { equal } from "../bytes.js";
import type { Leaderboard } from "../proto/tiltyard/registry/v1/leaderboard.js";
import type { LogEntry } from "../proto/tiltyard/type/v1/log.js";
import { readLeaf, type RecordLog } from "../recordlog.js";
import { Frontier, leafHash, openCheckpoint } from "../transparency.js";
import { momentNs } from "./moments.js";
import { difference, leaderboard } from "./rankings.js";
import { Replay } from "./replay.js";
import { Wrong, demand, told, type Claim } from "./wrong.js";

/** Where a claim does not hold. `index` is the leaf's; undefined where it is no single leaf's fault. */
export interface Failure {
  claim: Claim;
  index: number | undefined;
  reason: string;
}

/** What came out: how often each claim was checked, and where one does not hold. */
export interface Audit {
  size: number;
  checked: Readonly<Record<Claim, number>>;
  failures: readonly Failure[];
  /** The rankings that the scores give, of every task that shows them. */
  leaderboards: readonly Leaderboard[];
  /** Tasks whose scores are only committed to. */
  hidden: readonly string[];
  /** How many checks wait for ledger events that are still to come. */
  pending: number;
  /** When the first leaf that waits for one was written, in nanoseconds since 1970; undefined where none does. */
  pendingSinceNs: bigint | undefined;
}

/** What an audit may be told beside the record. */
export interface AuditOptions {
  /** Raw Ed25519, pins the log; without it the log's own genesis is believed to name its key. */
  logKey?: Uint8Array;
  /** Leaderboards that were shown, to be held against the log. */
  shown?: readonly Leaderboard[];
}

/** Checks all of a record. */
export function audit(record: RecordLog, { logKey, shown = [] }: AuditOptions = {}): Audit {
  const failures: Failure[] = [];
  const replay = new Replay();
  const { reading } = replay;
  let entries: LogEntry[] = [];
  try {
    entries = record.leaves.map(readLeaf);
    checkRoot(record, entries[0], logKey);
  } catch (error) {
    failures.push({ claim: "root", index: undefined, reason: told(error) });
  }
  for (const [index, entry] of entries.entries()) {
    try {
      replay.take(index, leafHash(record.leaves[index]!), entry);
    } catch (error) {
      // What is wrong with an envelope is said by whoever reads it.
      failures.push({ claim: error instanceof Wrong ? error.claim : "envelopes", index, reason: told(error) });
    }
  }
  failures.push(...replay.settle());
  const leaderboards = [...reading.story.tasks.keys()].flatMap((name) => leaderboard(reading.story, name) ?? []);
  for (const board of shown) {
    const expected = leaderboards.find(({ task }) => task === board.task);
    const reason = expected ? difference(board, expected) : `the log has no ranking of ${board.task}`;
    if (reason) failures.push({ claim: "leaderboards", index: undefined, reason });
  }
  const oldest = replay.oldestPending;
  const places = leaderboards.reduce((sum, { entries }) => sum + entries.length, 0);
  return {
    size: record.leaves.length,
    checked: { ...reading.checked, root: record.leaves.length, leaderboards: places },
    failures,
    leaderboards,
    hidden: [...reading.story.tasks.values()].filter(({ hides }) => hides).map(({ name }) => name),
    pending: replay.pending,
    pendingSinceNs: oldest === undefined ? undefined : momentNs(entries[oldest]!.time, "history", "the leaf"),
  };
}

function checkRoot(record: RecordLog, first: LogEntry | undefined, logKey: Uint8Array | undefined): void {
  const genesis = first?.entry?.$case === "genesis" ? first.entry.value : undefined;
  demand(genesis !== undefined, "root", "leaf 0 is not the genesis");
  const isPinned = !logKey || equal(genesis.logKey, logKey);
  demand(isPinned, "root", "the genesis names another log key than the one expected");
  const checkpoint = openCheckpoint(record.note, { name: genesis.origin, publicKey: genesis.logKey });
  const isOne = record.note.slice(record.note.lastIndexOf("\n\n") + 2).split("\n").length === 2;
  // Nothing beside what is signed may change unseen.
  demand(isOne, "root", "the checkpoint holds more than the log's one signature");
  const isItsLogs = checkpoint.origin === genesis.origin;
  demand(isItsLogs, "root", `the checkpoint is of ${checkpoint.origin}, the genesis of ${genesis.origin}`);
  const tree = new Frontier();
  for (const leaf of record.leaves) tree.append(leafHash(leaf));
  demand(checkpoint.size === tree.size, "root", `${tree.size} leaves came, ${checkpoint.size} are signed`);
  demand(equal(checkpoint.root, tree.root()), "root", "the leaves give another root than the checkpoint's");
}
