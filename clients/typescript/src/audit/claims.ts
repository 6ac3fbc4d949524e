/**
 * A whole record log checked from its leaves: what was signed, committed to, drawn, sealed and scored.
 *
 * Python's `tiltyard log verify` checks more: that every step is one that the rules allow, every verdict, balance and pool, and
 * the ranking. docs/transparency.md tells how.
 */

import { isDeepStrictEqual } from "node:util";

import { equal } from "./bytes.js";
import { evaluationSeal, holdoutAnchor, scoreCommitment, submissionCommitment } from "./commitments.js";
import { participantId } from "./identity.js";
import type { DrawReceipt } from "./proto/tiltyard/type/v1/draw.js";
import {
  type CommitStatement,
  type Envelope,
  type EvaluationReport,
  type RevealStatement,
  type SealStatement,
} from "./proto/tiltyard/type/v1/envelope.js";
import { ModelFault, Score, ScoreOutcome, ValidatorFaultKind } from "./proto/tiltyard/type/v1/evaluation.js";
import { LogEntry, type Genesis } from "./proto/tiltyard/type/v1/log.js";
import { TaskState, type TaskConfig } from "./proto/tiltyard/type/v1/task.js";
import { ReceiptInvalid, verifyReceipt } from "./receipts.js";
import type { RecordLog } from "./recordlog.js";
import { conclude, type Vote } from "./scoring.js";
import {
  COMMIT,
  ENDORSEMENT,
  JOIN,
  OWNER,
  REPORT,
  REVEAL,
  SEAL,
  openStatement,
  type StatementKind,
} from "./statements.js";
import { Frontier, leafHash, openCheckpoint } from "./transparency.js";

const FIRST_ROUND = 1;
const HOLDOUT_ROUND = 2;
const SHA256_BYTES = 32;

/** What an audit claims of a log that passes. */
export const CLAIMS = {
  root: "the checkpoint's root is the root of all leaves, and its note is signed",
  envelopes: "every envelope in the log is signed by whom it names",
  commitments: "every revealed model is the one committed to",
  draws: "every draw follows from the reveal, the selector's signature and the pool",
  seals: "every opened report is the one sealed",
  scores: "every score is the lower median of the opened reports",
} as const;

export type Claim = keyof typeof CLAIMS;

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
  /** Submissions whose score is only committed to, since their task hides it until it is closed. */
  hidden: readonly string[];
}

class Wrong extends Error {
  constructor(
    readonly claim: Claim,
    reason: string,
  ) {
    super(reason);
  }
}

interface Task {
  creator: string;
  /** As it was created: no amendment may change what is judged. */
  config: TaskConfig;
  state: TaskState;
  holdoutLeaf: Uint8Array | undefined;
}

interface Submission {
  name: string;
  task: Task;
  commit: CommitStatement;
  reveal?: { statement: RevealStatement; leaf: Uint8Array };
  draws: Map<number, DrawReceipt>;
  /** By round: opened reports by evaluation, outliers named at fault, and scores or the commitments to them. */
  reports: Map<number, Map<string, EvaluationReport>>;
  outliers: Map<number, Set<string>>;
  scores: Map<number, Score>;
  hidden: Map<number, Uint8Array>;
}

/**
 * Checks a record. `logKey`, raw Ed25519, pins the log; without it the log's own genesis is believed to name its key.
 */
export function audit(record: RecordLog, { logKey }: { logKey?: Uint8Array } = {}): Audit {
  const failures: Failure[] = [];
  const reading = new Reading();
  const frontier = new Frontier();
  for (const [index, leaf] of record.leaves.entries()) {
    const hash = leafHash(leaf);
    frontier.append(hash);
    try {
      reading.take(index, hash, decoded(leaf));
    } catch (error) {
      // What is wrong with an envelope or a leaf's bytes is said by whoever reads them.
      const reason = error instanceof Error ? error.message : String(error);
      failures.push({ claim: error instanceof Wrong ? error.claim : "envelopes", index, reason });
    }
  }
  try {
    checkRoot(record, reading.genesis, frontier, logKey);
  } catch (error) {
    failures.unshift({ claim: "root", index: undefined, reason: error instanceof Error ? error.message : String(error) });
  }
  for (const reason of reading.neverOpened()) failures.push({ claim: "scores", index: undefined, reason });
  const checked = { ...reading.checked, root: record.leaves.length };
  return { size: record.leaves.length, checked, failures, hidden: reading.hidden() };
}

function checkRoot(record: RecordLog, genesis: Genesis | undefined, tree: Frontier, logKey: Uint8Array | undefined): void {
  if (!genesis) throw new Error("leaf 0 is not the genesis");
  if (logKey && !equal(genesis.logKey, logKey)) throw new Error("the genesis names another log key than the one expected");
  const checkpoint = openCheckpoint(record.note, { name: genesis.origin, publicKey: genesis.logKey });
  if (checkpoint.origin !== genesis.origin) {
    throw new Error(`the checkpoint is of ${checkpoint.origin}, the genesis of ${genesis.origin}`);
  }
  // Nothing beside what is signed may change unseen.
  if (record.note.slice(record.note.lastIndexOf("\n\n") + 2).split("\n").length !== 2) {
    throw new Error("the checkpoint holds more than the log's one signature");
  }
  if (checkpoint.size !== tree.size) throw new Error(`${tree.size} leaves came, ${checkpoint.size} are signed`);
  if (!equal(checkpoint.root, tree.root())) throw new Error("the leaves give another root than the checkpoint's");
}

function decoded(leaf: Uint8Array): NonNullable<LogEntry["entry"]> {
  let entry: LogEntry["entry"];
  try {
    ({ entry } = LogEntry.decode(leaf));
  } catch (error) {
    throw new Wrong("root", `the leaf is not a LogEntry: ${String(error)}`);
  }
  if (!entry) throw new Wrong("root", "the entry is of an unknown kind");
  return entry;
}

function demand(holds: boolean, claim: Claim, otherwise: string): asserts holds {
  if (!holds) throw new Wrong(claim, otherwise);
}

/** What the leaves so far say. */
class Reading {
  genesis: Genesis | undefined;
  readonly checked: Record<Claim, number> = { root: 0, envelopes: 0, commitments: 0, draws: 0, seals: 0, scores: 0 };
  readonly #participants = new Set<string>();
  readonly #tasks = new Map<string, Task>();
  readonly #submissions = new Map<string, Submission>();
  readonly #seals = new Map<string, SealStatement>();

  /** The next leaf. Throws Wrong, or what is wrong with an envelope. */
  take(index: number, hash: Uint8Array, entry: NonNullable<LogEntry["entry"]>): void {
    demand((index === 0) === (entry.$case === "genesis"), "root", "a log begins with its genesis, and has one");
    switch (entry.$case) {
      case "genesis":
        this.genesis = entry.value;
        break;
      case "participantRegistered": {
        const { participant, publicKey } = entry.value;
        const isItsKeys = participant === `participants/${participantId(publicKey)}`;
        demand(isItsKeys, "envelopes", `${participant} is not the id of its key`);
        this.#participants.add(participant);
        break;
      }
      case "ownerBound":
        // An owner vouches with a key of its own, and takes part in nothing.
        this.#open(entry.value.statement, OWNER, ({ owner }) => owner, false);
        break;
      case "endorsementChanged":
        this.#open(entry.value.statement, ENDORSEMENT, ({ endorser }) => endorser);
        break;
      case "membershipChanged": {
        const { statement, ...said } = entry.value;
        if (!statement) break;
        const asked = this.#open(statement, JOIN, ({ participant }) => participant);
        const isAsked = (["task", "participant", "role"] as const).every((name) => asked[name] === said[name]);
        demand(isAsked, "envelopes", `${asked.participant} asked for another task or role`);
        break;
      }
      case "taskCreated": {
        const { task, creator, config } = entry.value;
        demand(config !== undefined && !this.#tasks.has(task), "envelopes", `${task} is created twice, or as nothing`);
        this.#tasks.set(task, { creator, config, state: TaskState.TASK_STATE_PREPARING, holdoutLeaf: undefined });
        break;
      }
      case "taskChanged":
        this.#task(entry.value.task).state = entry.value.state;
        break;
      case "holdoutChanged":
        if (entry.value.accepted) this.#task(entry.value.task).holdoutLeaf = hash;
        break;
      case "submissionCommitted":
        this.#committed(entry.value.submission, entry.value.statement);
        break;
      case "submissionRevealed":
        this.#revealed(this.#submission(entry.value.submission), hash, entry.value.statement);
        break;
      case "draw":
        this.#drawn(this.#submission(entry.value.submission), entry.value);
        break;
      case "evaluationSealed":
        this.#sealed(entry.value.evaluation, entry.value.statement);
        break;
      case "evaluationOpened":
        this.#opened(entry.value.evaluation, entry.value.report, entry.value.salt);
        break;
      case "validatorFault":
        if (entry.value.kind === ValidatorFaultKind.VALIDATOR_FAULT_KIND_OUTLIER) {
          const { submission, round } = this.#evaluation(evaluationOf(entry.value.assignment));
          within(submission.outliers, round, () => new Set<string>()).add(evaluationOf(entry.value.assignment));
        }
        break;
      case "scoreConcluded":
        this.#concluded(this.#submission(entry.value.submission), entry.value);
        break;
    }
  }

  /** Submissions with a score that is only committed to. */
  hidden(): string[] {
    return [...this.#submissions.values()].filter(({ hidden }) => hidden.size > 0).map(({ name }) => name);
  }

  /** What is wrong with tasks that are final and keep a score back. */
  neverOpened(): string[] {
    const isFinal = ({ task }: Submission) => task.state === TaskState.TASK_STATE_FINAL;
    const kept = [...this.#submissions.values()].filter((each) => isFinal(each) && each.hidden.size > 0);
    return kept.map(({ name }) => `the task is final, and the score of ${name} was never opened`);
  }

  /** The statement in an envelope, of this arena and signed by whom it names, who has registered; counted. */
  #open<T extends { origin: string }>(
    envelope: Envelope | undefined,
    kind: StatementKind<T>,
    named: (statement: T) => string,
    byParticipant = true,
  ): T {
    demand(envelope !== undefined, "envelopes", "the statement is missing");
    const { statement, signer } = openStatement(envelope, kind);
    const who = `participants/${signer}`;
    const { origin } = statement;
    demand(origin === this.genesis?.origin, "envelopes", `the statement is of another arena: ${origin}`);
    demand(named(statement) === who, "envelopes", `${named(statement)} did not sign, ${who} did`);
    demand(!byParticipant || this.#participants.has(who), "envelopes", `${who} signed, and has not registered`);
    this.checked.envelopes += 1;
    return statement;
  }

  #task(name: string): Task {
    const task = this.#tasks.get(name);
    demand(task !== undefined, "envelopes", `${name} was never created`);
    return task;
  }

  #submission(name: string): Submission {
    const submission = this.#submissions.get(name);
    demand(submission !== undefined, "commitments", `${name} was never committed`);
    return submission;
  }

  /** Submission, round and validator that an evaluation's name says. */
  #evaluation(name: string): { submission: Submission; round: number; validator: string } {
    const parts = /^(.+)\/evaluations\/([1-9][0-9]*)-([0-9a-f]{40})$/.exec(name);
    demand(parts !== null, "seals", `${name} is no name of an evaluation`);
    const [, submission = "", round, validator = ""] = parts;
    return { submission: this.#submission(submission), round: Number(round), validator: `participants/${validator}` };
  }

  #committed(name: string, envelope: Envelope | undefined): void {
    const commit = this.#open(envelope, COMMIT, ({ participant }) => participant);
    const isFirst = name.startsWith(`${commit.task}/submissions/`) && !this.#submissions.has(name);
    demand(isFirst, "commitments", `${name} is committed twice, or to another task`);
    this.#submissions.set(name, {
      name,
      task: this.#task(commit.task),
      commit,
      draws: new Map(),
      reports: new Map(),
      outliers: new Map(),
      scores: new Map(),
      hidden: new Map(),
    });
  }

  #revealed(submission: Submission, leaf: Uint8Array, envelope: Envelope | undefined): void {
    const { name, commit } = submission;
    const statement = this.#open(envelope, REVEAL, () => commit.participant);
    demand(statement.submission === name, "envelopes", `the reveal is of ${statement.submission}`);
    demand(!submission.reveal, "commitments", `${name} is revealed a second time`);
    const { origin, task, participant } = commit;
    const { modelDigest, salt } = statement;
    const isSized = modelDigest.length === SHA256_BYTES && salt.length === SHA256_BYTES;
    const holds = isSized && equal(submissionCommitment({ origin, task, participant, modelDigest, salt }), commit.commitment);
    demand(holds, "commitments", `${name} was committed to with another model or salt`);
    submission.reveal = { statement, leaf };
    this.checked.commitments += 1;
  }

  #drawn(submission: Submission, receipt: DrawReceipt): void {
    const { reveal, task, name } = submission;
    const what = receipt.draw;
    demand(reveal !== undefined, "draws", `${what} is for ${name}, which was never revealed`);
    let anchor = reveal.leaf;
    if (receipt.round !== FIRST_ROUND) {
      const isSecond = receipt.round === HOLDOUT_ROUND && task.holdoutLeaf !== undefined;
      demand(isSecond, "draws", `${what} is for a holdout that was not accepted`);
      anchor = holdoutAnchor({ holdoutLeaf: task.holdoutLeaf!, submission: name });
    }
    demand(equal(receipt.anchor, anchor), "draws", `${what} is not anchored in the leaf that fixed its moment`);
    demand(equal(receipt.revealSalt, reveal.statement.salt), "draws", `${what} has another salt than the reveal`);
    const wanted = task.config.validatorsPerSubmission;
    demand(receipt.assigned === wanted, "draws", `${what} assigns ${receipt.assigned}, the task wants ${wanted}`);
    const interested = [submission.commit.participant, task.creator];
    const isNeutral = !receipt.picks.some(({ participant }) => interested.includes(participant));
    demand(isNeutral, "draws", `${what} picks the submitter or the task's creator`);
    try {
      verifyReceipt(receipt, this.genesis?.selectorKey ?? new Uint8Array());
    } catch (error) {
      if (!(error instanceof ReceiptInvalid)) throw error;
      throw new Wrong("draws", `${what}: ${error.message}`);
    }
    const earlier = submission.draws.get(receipt.round);
    if (earlier) {
      const goesOn =
        equal(earlier.poolRoot, receipt.poolRoot) &&
        isDeepStrictEqual(receipt.picks.slice(0, earlier.picks.length), earlier.picks) &&
        isDeepStrictEqual(receipt.passedOver.slice(0, earlier.passedOver.length), earlier.passedOver);
      demand(goesOn, "draws", `${what} does not go on where it stopped`);
    }
    submission.draws.set(receipt.round, receipt);
    this.checked.draws += 1;
  }

  #sealed(name: string, envelope: Envelope | undefined): void {
    const { submission, round, validator } = this.#evaluation(name);
    const seal = this.#open(envelope, SEAL, () => validator);
    demand(evaluationOf(seal.assignment) === name, "seals", `${name} was sealed for ${seal.assignment}`);
    demand(!this.#seals.has(name), "seals", `${name} is sealed twice`);
    const isPicked = submission.draws.get(round)?.picks.some(({ participant }) => participant === validator) ?? false;
    demand(isPicked, "seals", `${name} is sealed by one who was never drawn`);
    this.#seals.set(name, seal);
  }

  #opened(name: string, envelope: Envelope | undefined, salt: Uint8Array): void {
    const { submission, round, validator } = this.#evaluation(name);
    const report = this.#open(envelope, REPORT, () => validator);
    const seal = this.#seals.get(name);
    demand(seal !== undefined, "seals", `${name} is opened, and was never sealed`);
    const reports = within(submission.reports, round, () => new Map<string, EvaluationReport>());
    demand(!reports.has(name), "seals", `${name} is opened twice`);
    const { assignment } = seal;
    const { payload } = envelope ?? { payload: new Uint8Array() };
    const holds = salt.length === SHA256_BYTES && equal(evaluationSeal({ assignment, report: payload, salt }), seal.seal);
    demand(holds, "seals", `${name} is not what was sealed`);
    demand(report.assignment === assignment, "seals", `${name} reports on ${report.assignment}`);
    const { modelDigest } = submission.reveal?.statement ?? { modelDigest: new Uint8Array() };
    demand(equal(report.modelDigest, modelDigest), "scores", `${name} is about another model than the submission's`);
    const { evaluationDataset, holdout } = submission.task.config;
    const dataset = (round === FIRST_ROUND ? evaluationDataset : holdout)?.sha256 ?? new Uint8Array();
    demand(equal(report.datasetDigest, dataset), "scores", `${name} is about another dataset than the task's`);
    demand(!submission.scores.has(round), "scores", `${name} is opened after the score was concluded`);
    reports.set(name, report);
    this.checked.seals += 1;
  }

  #concluded(
    submission: Submission,
    entry: { score?: Score | undefined; commitment: Uint8Array; salt: Uint8Array },
  ): void {
    const { name } = submission;
    const { score, commitment, salt } = entry;
    if (!score) {
      const isCommitment = commitment.length === SHA256_BYTES && salt.length === 0 && !submission.hidden.has(FIRST_ROUND);
      demand(isCommitment, "scores", `the score of ${name} is kept back without a commitment`);
      submission.hidden.set(FIRST_ROUND, commitment);
      return;
    }
    const { round } = score;
    demand(submission.draws.has(round), "scores", `${name} was scored and never drawn`);
    demand(!submission.scores.has(round), "scores", `${name} is scored twice in a round`);
    checkScore(submission, score);
    const kept = submission.hidden.get(round);
    demand((kept === undefined) === (salt.length === 0), "scores", `the score of ${name} is shown unsalted, or was never kept back`);
    if (kept) {
      const bytes = Score.encode(score).finish();
      const holds = salt.length === SHA256_BYTES && equal(scoreCommitment({ score: bytes, salt }), kept);
      demand(holds, "scores", `the score of ${name} is not the one committed to`);
      submission.hidden.delete(round);
    }
    submission.scores.set(round, score);
    this.checked.scores += 1;
  }
}

/** Concludes a round again. Throws Wrong with what differs. */
function checkScore(submission: Submission, score: Score): void {
  const { name, task } = submission;
  const opened = submission.reports.get(score.round) ?? new Map<string, EvaluationReport>();
  const counted = new Map([...opened].filter(([, report]) => !report.nodeEndpoint));
  const isAll =
    counted.size > 0 &&
    score.evaluations.length === counted.size &&
    new Set(score.evaluations).size === counted.size &&
    score.evaluations.every((each) => counted.has(each));
  demand(isAll, "scores", `the score of ${name} counts other evaluations than were opened`);
  const votes = score.evaluations.map((each) => vote(each, counted.get(each)!));
  let result;
  try {
    result = conclude(votes, task.config.validatorsPerSubmission, task.config.tolerance);
  } catch (error) {
    throw new Wrong("scores", `the score of ${name}: ${error instanceof Error ? error.message : String(error)}`);
  }
  const { outcome, correct, total, tolerance, outliers } = result;
  const expected: Score = {
    outcome: ScoreOutcome[`SCORE_OUTCOME_${outcome}`],
    correct,
    total,
    fault: ModelFault[`MODEL_FAULT_${result.fault || "UNSPECIFIED"}` as keyof typeof ModelFault],
    tolerance,
    evaluations: score.evaluations,
    outliers,
    round: score.round,
  };
  demand(isDeepStrictEqual(expected, score), "scores", `the score of ${name} does not follow from its reports`);
  const named = submission.outliers.get(score.round) ?? new Set();
  demand(isDeepStrictEqual(named, new Set(outliers)), "scores", `the outliers of ${name} are not those named at fault`);
}

function vote(name: string, { finding }: EvaluationReport): Vote {
  if (finding?.$case === "counts") {
    const { correct, total } = finding.value;
    const addsUp = correct >= 0n && correct <= total && total > 0n;
    demand(addsUp, "scores", `the counts of ${name} do not add up`);
    return { validator: name, counts: finding.value };
  }
  const fault: string | undefined = ModelFault[finding?.value ?? ModelFault.MODEL_FAULT_UNSPECIFIED];
  demand(fault !== undefined, "scores", `${name} names a fault that there is not`);
  return { validator: name, fault: fault.replace("MODEL_FAULT_", "") };
}

function evaluationOf(assignment: string): string {
  return assignment.replace("/assignments/", "/evaluations/");
}

function within<K, V>(map: Map<K, V>, key: K, made: () => V): V {
  const value = map.get(key) ?? made();
  map.set(key, value);
  return value;
}
