/** A log read leaf by leaf, each held against what the leaves before it say. */

import { equal, toHex, toInteger } from "../bytes.js";
import type { DrawReceipt } from "../proto/tiltyard/type/v1/draw.js";
import type { LogEntry, TaskChanged } from "../proto/tiltyard/type/v1/log.js";
import { LedgerEventKind, type LedgerEvent } from "../proto/tiltyard/type/v1/stake.js";
import { TaskState } from "../proto/tiltyard/type/v1/task.js";
import * as arena from "./arena.js";
import * as duties from "./duties.js";
import * as judging from "./judging.js";
import { Ledger } from "./ledger.js";
import * as memberships from "./memberships.js";
import { momentNs } from "./moments.js";
import { Reading } from "./reading.js";
import { keyOf, type Draw, type Task } from "./story.js";
import * as tasks from "./tasks.js";
import { Wrong, demand, type Claim } from "./wrong.js";

/** What can be said only at the end, and at which leaf. */
export interface Late {
  claim: Claim;
  index: number;
  reason: string;
}

/** A log that is read, and the ledger that its events give. */
export class Replay {
  readonly reading = new Reading();
  /** What cannot be said yet, for want of the ledger's later events. */
  pending = 0;
  /** The first leaf about which something cannot be said yet. */
  oldestPending: number | undefined;
  readonly #ledger = new Ledger((name) => this.reading.story.tasks.get(name)?.config);
  /** The leaf of each charge by the key of draw and participant. */
  readonly #charged = new Map<string, { draw: string; participant: string; index: number }>();

  /** The next leaf, by its hash. Throws Wrong, or what is wrong with an envelope. */
  take(index: number, leaf: Uint8Array, { entry, time }: LogEntry): void {
    demand(entry !== undefined, "history", "the entry is of an unknown kind");
    const isInPlace = (index === 0) === (entry.$case === "genesis");
    demand(isInPlace, "history", "a log begins with its genesis, and has one");
    const { reading } = this;
    reading.timeNs = momentNs(time, "history", "the leaf");
    switch (entry.$case) {
      case "genesis":
        return arena.began(reading, entry.value);
      case "participantRegistered":
        return arena.participantRegistered(reading, entry.value);
      case "ownerBound":
        return arena.ownerBound(reading, entry.value);
      case "endorsementChanged":
        return arena.endorsementChanged(reading, entry.value);
      case "outageEnded":
        return arena.outageEnded(reading, entry.value);
      case "verdict":
        return memberships.verdictGiven(reading, index, entry.value);
      case "membershipChanged":
        return memberships.membershipChanged(reading, entry.value);
      case "taskCreated":
        return tasks.taskCreated(reading, entry.value);
      case "taskChanged":
        tasks.taskChanged(reading, entry.value);
        return this.#checkBacked(entry.value);
      case "holdoutChanged":
        return tasks.holdoutChanged(reading, leaf, entry.value);
      case "submissionCommitted":
        return judging.committed(reading, entry.value);
      case "submissionRevealed":
        return judging.revealed(reading, leaf, entry.value);
      case "submissionChanged":
        return judging.changed(reading, index, entry.value);
      case "draw":
        return judging.drawn(reading, index, entry.value);
      case "evaluationSealed":
        return judging.sealed(reading, entry.value);
      case "evaluationOpened":
        return judging.opened(reading, entry.value);
      case "scoreConcluded":
        return judging.concluded(reading, entry.value);
      case "assignmentChanged":
        return duties.assigned(reading, index, entry.value);
      case "validatorFault":
        return duties.faulted(reading, entry.value);
      case "ledgerEvent":
        return this.#ledgerEvent(index, entry.value);
      default:
        // A kind that the contract has and this does not know.
        throw new Wrong("history", `nothing is known of ${(entry satisfies never as { $case: string }).$case}`);
    }
  }

  /** What can be said only when all leaves, and all of the ledger, are known. */
  settle(): Late[] {
    const { story } = this.reading;
    const history = [...judging.cancelledWithoutTheirTask(story), ...duties.unnamedFaults(story)];
    return [
      ...history.map((late): Late => ({ claim: "history", ...late })),
      ...this.#chargedWithoutAPick(),
      ...this.#verdicts(),
      ...this.#pools(),
    ];
  }

  #chargedWithoutAPick(): Late[] {
    const { draws } = this.reading.story;
    const picked = new Map<string, Set<string>>();
    for (const { receipt } of draws.values()) {
      picked.set(receipt.draw, new Set(receipt.picks.map(({ participant }) => participant)));
    }
    return [...this.#charged.values()]
      .filter(({ draw, participant }) => picked.get(draw)?.has(participant) === false)
      .map(({ draw, participant, index }) => ({
        claim: "ledger",
        index,
        reason: `${participant} is charged for ${draw}, which has not picked it`,
      }));
  }

  #verdicts(): Late[] {
    const { story, checked } = this.reading;
    const found: Late[] = [];
    for (const { index, verdict, decideTimeNs } of story.verdicts) {
      const { participant } = verdict;
      const amounts = memberships.stakesWeighed(verdict);
      if (amounts.every((amount) => this.#ledger.had(participant, amount))) {
        checked.verdicts += 1;
      } else if (this.#ledger.lastTimeNs > decideTimeNs) {
        const reason = `${participant} never had a stake of ${amounts.join(", ")} available`;
        found.push({ claim: "verdicts", index, reason });
      } else {
        this.#waitFor(index);
      }
    }
    return found;
  }

  #pools(): Late[] {
    const { story, checked } = this.reading;
    const found: Late[] = [];
    for (const each of story.draws.values()) {
      const { receipt, drawTimeNs, index } = each;
      const { draw, poolRoot, poolWeight, poolSize } = receipt;
      const pool = this.#ledger.drawn.get(draw);
      if (!pool && this.#ledger.lastTimeNs > drawTimeNs) {
        found.push({ claim: "pools", index, reason: `${draw} was never charged to anybody's quota` });
        continue;
      }
      // What a FINAL task lacks was told of at the leaf that made it so.
      if (this.#taskOf(receipt).state !== TaskState.TASK_STATE_FINAL) {
        const missing = this.#unbacked(each).map((one) => one.index);
        if (missing.length > 0) this.#waitFor(Math.min(...missing));
      }
      if (!pool) continue;
      if (equal(poolRoot, pool.root) && toInteger(poolWeight) === pool.weight && poolSize === pool.size) {
        checked.pools += 1;
      } else {
        const ledgers = `the ledger gives ${toHex(pool.root)} with ${pool.size} owner groups`;
        const reason = `${draw} was drawn from a pool of root ${toHex(poolRoot)}, ${ledgers}`;
        found.push({ claim: "pools", index, reason });
      }
    }
    return found;
  }

  /** Something about a leaf cannot be said yet. */
  #waitFor(index: number): void {
    this.pending += 1;
    this.oldestPending = Math.min(index, this.oldestPending ?? index);
  }

  /** Whether the ledger holds all that belongs to the draws of a task that is FINAL. Throws Wrong. */
  #checkBacked({ task, state }: TaskChanged): void {
    if (state !== TaskState.TASK_STATE_FINAL) return;
    for (const draw of this.reading.story.draws.values()) {
      if (this.#taskOf(draw.receipt).name !== task) continue;
      const [missing] = this.#unbacked(draw);
      demand(missing === undefined, "ledger", `${task} is final, and ${missing?.reason}`);
    }
  }

  /** What of a draw the ledger has not told so far: the leaf that it should follow, and what is missing. */
  #unbacked({ receipt, picked }: Draw): { index: number; reason: string }[] {
    const { draw } = receipt;
    return receipt.picks.flatMap(({ participant }) => {
      const isGivenBack = this.#ledger.isGivenBack(draw, participant);
      if (isGivenBack === undefined) {
        return [{ index: picked.get(participant)!, reason: `${participant} is not charged for ${draw}` }];
      }
      const index = duties.releaseOf(this.reading.story, receipt, participant);
      if (index === undefined || isGivenBack) return [];
      return [{ index, reason: `${participant} is released and not refunded for ${draw}` }];
    });
  }

  #taskOf({ submission }: DrawReceipt): Task {
    return this.reading.story.submissions.get(submission)!.task;
  }

  #ledgerEvent(index: number, event: LedgerEvent): void {
    duties.checkLedgerEvent(this.reading.story, event);
    this.#ledger.take(event);
    duties.checkEventNames(event);
    if (event.kind === LedgerEventKind.LEDGER_EVENT_KIND_QUOTA_CHARGED) {
      const { draw, participant } = event;
      this.#charged.set(keyOf(draw, participant), { draw, participant, index });
    }
    this.reading.checked.ledger += 1;
  }
}
