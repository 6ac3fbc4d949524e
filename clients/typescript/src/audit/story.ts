/** What the leaves read so far say: the state that the next leaf must follow from. */

import type { PublicKey } from "../bls.js";
import type { DrawReceipt } from "../proto/tiltyard/type/v1/draw.js";
import type {
  CommitStatement,
  EvaluationReport,
  RevealStatement,
  SealStatement,
} from "../proto/tiltyard/type/v1/envelope.js";
import {
  RejectionReason,
  SubmissionState,
  type AssignmentState,
  type Score,
  type ValidatorFaultKind,
} from "../proto/tiltyard/type/v1/evaluation.js";
import type { EligibilityVerdict, MembershipState, Role } from "../proto/tiltyard/type/v1/participation.js";
import { ScoreVisibility, TaskState, type TaskConfig } from "../proto/tiltyard/type/v1/task.js";

export const FIRST_ROUND = 1;
export const HOLDOUT_ROUND = 2;

const NOTHING: Uint8Array = new Uint8Array();

/** Several values as the key of a map: no two lists of them give the same. */
export function keyOf(...parts: (string | number)[]): string {
  return JSON.stringify(parts);
}

/** One task. */
export class Task {
  state = TaskState.TASK_STATE_PREPARING;
  /** Hash of the leaf that accepted the holdout; empty without one. */
  holdoutLeaf = NOTHING;
  /** Whether a leaf says what became of the holdout. */
  isHoldoutTold = false;
  rankingRound = FIRST_ROUND;
  /** How many were committed. */
  submissions = 0;

  constructor(
    readonly name: string,
    readonly creator: string,
    public config: TaskConfig,
  ) {}

  /** Digest of the dataset that a round is judged on. */
  dataset(round: number): Uint8Array {
    const { evaluationDataset, holdout } = this.config;
    return (round === FIRST_ROUND ? evaluationDataset : holdout)?.sha256 ?? NOTHING;
  }

  /** Whether its scores are only committed to for now. */
  get hides(): boolean {
    const isBefore = [TaskState.TASK_STATE_PREPARING, TaskState.TASK_STATE_OPEN].includes(this.state);
    return this.config.scoreVisibility === ScoreVisibility.SCORE_VISIBILITY_LADDER && isBefore;
  }
}

/** One submission. Scores are by round; a hidden one is its commitment until it is opened. */
export class Submission {
  state = SubmissionState.SUBMISSION_STATE_COMMITTED;
  reveal: RevealStatement | undefined;
  revealLeaf = NOTHING;
  readonly scores = new Map<number, Score>();
  readonly hidden = new Map<number, Uint8Array>();
  /** Why it was rejected. */
  reason = RejectionReason.REJECTION_REASON_UNSPECIFIED;
  /** The leaf that rejected it. */
  endIndex = -1;

  constructor(
    readonly name: string,
    readonly task: Task,
    readonly commit: CommitStatement,
    readonly commitTimeNs: bigint,
    /** Grows with the commits of one task. */
    readonly number: number,
  ) {}
}

/** One assignment. `index` is the leaf of its last step, `owed` the fault that a leaf has still to name, or 0. */
export interface Duty {
  state: AssignmentState;
  readonly position: number;
  index: number;
  owed: ValidatorFaultKind | 0;
}

/** A verdict whose stake is compared with the ledger when all of it is known. */
export interface PendingVerdict {
  index: number;
  verdict: EligibilityVerdict;
  decideTimeNs: bigint;
}

/** A draw: its last receipt, when that was made, the leaf of the first, and of each pick the leaf that first says it. */
export interface Draw {
  receipt: DrawReceipt;
  drawTimeNs: bigint;
  index: number;
  picked: ReadonlyMap<string, number>;
}

/** Everything known so far. */
export class Story {
  origin = "";
  selector: PublicKey | undefined;
  /** Names for people by participants/{id}. */
  readonly participants = new Map<string, string>();
  readonly owners = new Map<string, string>();
  /** Keys of endorser, subject and field; those taken back are kept, since a verdict may be older. */
  readonly endorsements = new Set<string>();
  /** Keys of endorser and subject alone. */
  readonly endorsed = new Set<string>();
  readonly tasks = new Map<string, Task>();
  /** Keys of task, participant and role. */
  readonly eligible = new Set<string>();
  /** Whose endorsements a verdict on a task's creator names, by the key of task and creator. */
  readonly vouchers = new Map<string, ReadonlySet<string>>();
  /** By the key of task and participant. */
  readonly members = new Map<string, { role: Role; state: MembershipState }>();
  /** By assignment. */
  readonly duties = new Map<string, Duty>();
  /** Keys of assignment and kind of what was named. */
  readonly faults = new Set<string>();
  readonly verdicts: PendingVerdict[] = [];
  readonly submissions = new Map<string, Submission>();
  /** By the key of submission and round. */
  readonly draws = new Map<string, Draw>();
  readonly seals = new Map<string, SealStatement>();
  readonly #reports = new Map<string, Map<string, EvaluationReport>>();
  readonly #outliers = new Map<string, Set<string>>();

  /** Opened reports by evaluation, of a submission and round. */
  reports(submission: string, round: number): Map<string, EvaluationReport> {
    return within(this.#reports, keyOf(submission, round), () => new Map());
  }

  /** Evaluations that were named as outliers by faults, of a submission and round. */
  outliers(submission: string, round: number): Set<string> {
    return within(this.#outliers, keyOf(submission, round), () => new Set());
  }

  /** The participant with all that are bound to the same owner. */
  group(participant: string): ReadonlySet<string> {
    const owner = this.owners.get(participant) ?? participant;
    return new Set([participant, owner, ...[...this.owners].filter(([, of]) => of === owner).map(([each]) => each)]);
  }
}

function within<V>(map: Map<string, V>, key: string, made: () => V): V {
  const value = map.get(key) ?? made();
  map.set(key, value);
  return value;
}
