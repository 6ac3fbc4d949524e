/** Commits, reveals, draws, seals, reports and scores, each held against what must come before it. */

import { equal } from "../bytes.js";
import { SALT_BYTES, evaluationSeal, holdoutAnchor, submissionCommitment } from "../commitments.js";
import { PassedOver, Pick, type DrawReceipt } from "../proto/tiltyard/type/v1/draw.js";
import { ModelFault, RejectionReason, ScoreOutcome, SubmissionState, type Score } from "../proto/tiltyard/type/v1/evaluation.js";
import type {
  EvaluationOpened,
  EvaluationSealed,
  ScoreConcluded,
  SubmissionChanged,
  SubmissionCommitted,
  SubmissionRevealed,
} from "../proto/tiltyard/type/v1/log.js";
import { MembershipState, Role } from "../proto/tiltyard/type/v1/participation.js";
import { TaskState } from "../proto/tiltyard/type/v1/task.js";
import { ReceiptInvalid, checkReceipt } from "../receipts.js";
import { COMMIT, REPORT, REVEAL, SEAL } from "../statements.js";
import * as duties from "./duties.js";
import { durationNs, momentNs } from "./moments.js";
import type { Reading } from "./reading.js";
import { checkOpenedScore, checkScore } from "./scores.js";
import { FIRST_ROUND, HOLDOUT_ROUND, Submission, keyOf, type Story, type Task } from "./story.js";
import { Wrong, demand } from "./wrong.js";

const SHA256_BYTES = 32;
const { SUBMISSION_STATE_COMMITTED: COMMITTED, SUBMISSION_STATE_REVEALED: REVEALED } = SubmissionState;
const { SUBMISSION_STATE_EVALUATING: EVALUATING, SUBMISSION_STATE_SCORED: SCORED } = SubmissionState;
const { SUBMISSION_STATE_REJECTED: REJECTED } = SubmissionState;
// Found by validators, so that there is a score behind it.
const JUDGED = [
  RejectionReason.REJECTION_REASON_NAN_OUTPUT,
  RejectionReason.REJECTION_REASON_TOO_SLOW,
  RejectionReason.REJECTION_REASON_OUT_OF_MEMORY,
  RejectionReason.REJECTION_REASON_CRASHED,
  RejectionReason.REJECTION_REASON_AMBIGUOUS,
];
// Found by a look at the file, or by validators.
const STRUCTURE = [
  RejectionReason.REJECTION_REASON_BAD_FORMAT,
  RejectionReason.REJECTION_REASON_SHAPE_MISMATCH,
  RejectionReason.REJECTION_REASON_TOO_LARGE,
  RejectionReason.REJECTION_REASON_DIGEST_MISMATCH,
];

/** A model is committed to, by an active training node of an open task. */
export function committed(reading: Reading, { submission: name, statement }: SubmissionCommitted): void {
  const { story } = reading;
  const { statement: commit, signer } = reading.open(statement, COMMIT);
  const task = reading.task(commit.task);
  demand(commit.participant === signer, "envelopes", `${commit.participant} did not sign, ${signer} did`);
  const number = task.submissions + 1;
  const isNext = name === `${task.name}/submissions/${number}`;
  demand(isNext, "history", `${name} is not the next submission of ${commit.task}`);
  const isOpen = task.state === TaskState.TASK_STATE_OPEN;
  demand(isOpen, "history", `${name} is committed, ${task.name} not open`);
  const member = story.members.get(keyOf(task.name, signer));
  const isActive =
    member?.role === Role.ROLE_TRAINING_NODE && member.state === MembershipState.MEMBERSHIP_STATE_ACTIVE;
  demand(isActive, "history", `${signer} is no active training node of ${task.name}`);
  task.submissions = number;
  story.submissions.set(name, new Submission(name, task, commit, reading.timeNs, number));
}

/** A commitment is opened. */
export function revealed(reading: Reading, leaf: Uint8Array, entry: SubmissionRevealed): void {
  const submission = submissionOf(reading.story, entry.submission);
  const { statement: reveal, signer } = reading.open(entry.statement, REVEAL);
  const { name, commit } = submission;
  demand(commit.participant === signer, "envelopes", `${commit.participant} did not sign, ${signer} did`);
  demand(reveal.submission === name, "envelopes", `the reveal is of ${reveal.submission}`);
  demand(submission.state === COMMITTED, "history", `${name} is revealed a second time, or too late`);
  const { origin, task, participant } = commit;
  const { modelDigest, salt } = reveal;
  const isSized = modelDigest.length === SHA256_BYTES && salt.length === SALT_BYTES;
  const holds = isSized && equal(submissionCommitment({ origin, task, participant, modelDigest, salt }), commit.commitment);
  demand(holds, "commitments", `${name} was committed to with another model or salt`);
  Object.assign(submission, { reveal, revealLeaf: leaf, state: REVEALED });
  reading.checked.commitments += 1;
}

/** The registry concludes a state. */
export function changed({ story, checked, timeNs }: Reading, index: number, entry: SubmissionChanged): void {
  const submission = submissionOf(story, entry.submission);
  const { name, state: before } = submission;
  switch (entry.state) {
    case EVALUATING: {
      const isDrawn = story.draws.has(keyOf(name, FIRST_ROUND));
      demand(before === REVEALED && isDrawn, "history", `${name} is evaluated without a reveal and a draw`);
      break;
    }
    case SCORED: {
      demand(before === EVALUATING || before === SCORED, "history", `${name} is scored without an evaluation`);
      const outcome = submission.scores.get(FIRST_ROUND)?.outcome;
      const stands = submission.hidden.size > 0 || outcome === ScoreOutcome.SCORE_OUTCOME_SCORED;
      demand(stands, "scores", `${name} is scored, but no score was concluded`);
      break;
    }
    case REJECTED:
      demand(before !== REJECTED, "history", `${name} is rejected twice`);
      checkRejection(story, submission, entry, timeNs);
      break;
    default:
      throw new Wrong("history", `${name} goes to a state that only its submitter brings about`);
  }
  submission.state = entry.state;
  if (entry.state === REJECTED) Object.assign(submission, { reason: entry.reason, endIndex: index });
  const isCopy = entry.state === REJECTED && entry.reason === RejectionReason.REJECTION_REASON_COPY;
  demand(isCopy || !entry.original, "history", `${name} is no copy, and ${entry.original} is named`);
  checked.history += 1;
}

function checkRejection(story: Story, submission: Submission, entry: SubmissionChanged, timeNs: bigint): void {
  const { name, task } = submission;
  const { reason, original: first } = entry;
  if (reason === RejectionReason.REJECTION_REASON_REVEAL_EXPIRED) {
    const isCommitted = submission.state === COMMITTED;
    demand(isCommitted, "history", `${name} was revealed, and is rejected as if it were not`);
    const expiryNs = submission.commitTimeNs + durationNs(task.config.schedule?.revealTime);
    demand(timeNs >= expiryNs, "history", `${name} is rejected before its time to be revealed is over`);
  } else if (reason === RejectionReason.REJECTION_REASON_COPY) {
    const original = story.submissions.get(first);
    const isCopy =
      original?.task === task &&
      original.number < submission.number &&
      original.reveal !== undefined &&
      submission.reveal !== undefined &&
      equal(original.reveal.modelDigest, submission.reveal.modelDigest);
    demand(isCopy, "history", `${name} is no copy of ${first || "anything"}`);
  } else if (wasJudged(story, submission, reason) && submission.hidden.size === 0) {
    const score = submission.scores.get(FIRST_ROUND);
    const isFound = score !== undefined && gives(score, reason);
    demand(isFound, "scores", `${name} is rejected for what nobody found`);
  }
}

/** Whether a rejection for this reason must rest on a score: a look at the file comes before any draw. */
function wasJudged(story: Story, { name }: Submission, reason: RejectionReason): boolean {
  return JUDGED.includes(reason) || (STRUCTURE.includes(reason) && story.draws.has(keyOf(name, FIRST_ROUND)));
}

function gives({ outcome, fault }: Score, reason: RejectionReason): boolean {
  if (outcome === ScoreOutcome.SCORE_OUTCOME_AMBIGUOUS) return reason === RejectionReason.REJECTION_REASON_AMBIGUOUS;
  const found = (ModelFault[fault] ?? "").replace("MODEL_FAULT_", "REJECTION_REASON_");
  return outcome === ScoreOutcome.SCORE_OUTCOME_FAULT && RejectionReason[reason] === found;
}

/** Validators are drawn, or the order of a draw is extended. */
export function drawn({ story, checked }: Reading, index: number, receipt: DrawReceipt): void {
  const submission = submissionOf(story, receipt.submission);
  const { name, reveal, task, commit } = submission;
  const what = receipt.draw;
  demand(reveal !== undefined, "draws", `${what} is for ${name}, which was never revealed`);
  let anchor = submission.revealLeaf;
  if (receipt.round !== FIRST_ROUND) {
    demand(receipt.round === HOLDOUT_ROUND, "draws", `${what} is for round ${receipt.round}, which there is not`);
    demand(task.holdoutLeaf.length > 0, "draws", `${what} is for a holdout that was not accepted`);
    anchor = holdoutAnchor({ holdoutLeaf: task.holdoutLeaf, submission: name });
  }
  demand(equal(receipt.anchor, anchor), "draws", `${what} is not anchored in the leaf that fixed its moment`);
  demand(equal(receipt.revealSalt, reveal.salt), "draws", `${what} has another salt than the reveal`);
  const wanted = task.config.validatorsPerSubmission;
  demand(receipt.assigned === wanted, "draws", `${what} assigns ${receipt.assigned}, the task wants ${wanted}`);
  const interested = [commit.participant, task.creator];
  const isNeutral = !receipt.picks.some(({ participant }) => interested.includes(participant));
  demand(isNeutral, "draws", `${what} picks the submitter or the task's creator`);
  const stranger = receipt.picks.flatMap(({ members }) => members).find((who) => !story.participants.has(who));
  demand(stranger === undefined, "draws", `${what} names ${stranger}, who has not registered`);
  const drawTimeNs = momentNs(receipt.drawTime, "draws", what);
  try {
    checkReceipt(receipt, story.selector);
  } catch (error) {
    if (!(error instanceof ReceiptInvalid)) throw error;
    throw new Wrong("draws", `${what}: ${error.message}`);
  }
  const key = keyOf(name, receipt.round);
  const earlier = story.draws.get(key);
  if (earlier) checkExtension(earlier.receipt, receipt);
  const picks = receipt.picks.map(({ participant }) => [participant, index] as const);
  const picked = new Map([...picks, ...(earlier?.picked ?? [])]);
  story.draws.set(key, { receipt, drawTimeNs, index: earlier?.index ?? index, picked });
  checked.draws += 1;
}

function checkExtension(earlier: DrawReceipt, later: DrawReceipt): void {
  const goesOn =
    equal(earlier.poolRoot, later.poolRoot) &&
    isBeginning(earlier.picks.map(packed(Pick)), later.picks.map(packed(Pick))) &&
    isBeginning(earlier.passedOver.map(packed(PassedOver)), later.passedOver.map(packed(PassedOver)));
  demand(goesOn, "draws", `${later.draw} does not go on where it stopped`);
}

function packed<T>(codec: { encode(message: T): { finish(): Uint8Array } }): (message: T) => Uint8Array {
  return (message) => codec.encode(message).finish();
}

function isBeginning(earlier: readonly Uint8Array[], later: readonly Uint8Array[]): boolean {
  return earlier.length <= later.length && earlier.every((each, at) => equal(each, later[at]!));
}

/** A report is sealed under a lease. */
export function sealed(reading: Reading, { evaluation: name, statement }: EvaluationSealed): void {
  const { story } = reading;
  const { statement: seal, signer } = reading.open(statement, SEAL);
  const { validator } = duties.parts(name, "/evaluations/");
  demand(validator === signer, "envelopes", `${validator} did not sign, ${signer} did`);
  const assignment = name.replaceAll("/evaluations/", "/assignments/");
  demand(seal.assignment === assignment, "seals", `${name} was sealed for ${seal.assignment}`);
  demand(!story.seals.has(name), "seals", `${name} is sealed twice`);
  duties.seal(story, assignment, name);
  story.seals.set(name, seal);
}

/** A sealed report is laid open. */
export function opened(reading: Reading, { evaluation: name, report: envelope, salt }: EvaluationOpened): void {
  const { story } = reading;
  const { statement: report, signer } = reading.open(envelope, REPORT);
  const { submission: submissionName, round, validator } = duties.parts(name, "/evaluations/");
  const submission = submissionOf(story, submissionName);
  demand(validator === signer, "envelopes", `${validator} did not sign, ${signer} did`);
  const seal = story.seals.get(name);
  demand(seal !== undefined, "seals", `${name} is opened, and was never sealed`);
  const reports = story.reports(submissionName, round);
  demand(!reports.has(name), "seals", `${name} is opened twice`);
  const { assignment } = seal;
  const { payload } = envelope!;
  const holds = salt.length === SALT_BYTES && equal(evaluationSeal({ assignment, report: payload, salt }), seal.seal);
  demand(holds, "seals", `${name} is not what was sealed`);
  demand(report.assignment === assignment, "seals", `${name} reports on ${report.assignment}`);
  const isIts = equal(report.modelDigest, submission.reveal?.modelDigest ?? new Uint8Array());
  demand(isIts, "scores", `${name} is about another model than ${submission.name}'s`);
  const isOnIts = equal(report.datasetDigest, submission.task.dataset(round));
  demand(isOnIts, "scores", `${name} is about another dataset than the task's`);
  demand(!submission.scores.has(round), "scores", `${name} is opened after the score was concluded`);
  duties.openReport(story, assignment, name);
  reports.set(name, report);
  reading.checked.seals += 1;
}

/** A score, or a commitment to one. */
export function concluded({ story, checked }: Reading, entry: ScoreConcluded): void {
  const submission = submissionOf(story, entry.submission);
  const { name, task, hidden, scores } = submission;
  const { score, commitment, salt } = entry;
  if (!score) {
    const isKept = task.hides && commitment.length === SHA256_BYTES && salt.length === 0;
    demand(isKept && hidden.size === 0, "scores", `the score of ${name} is kept back`);
    hidden.set(FIRST_ROUND, commitment);
    return;
  }
  const { round } = score;
  const isSalted = salt.length > 0;
  demand(isSalted || !task.hides, "scores", `the score of ${name} is shown, and was to be kept back`);
  demand([FIRST_ROUND, HOLDOUT_ROUND].includes(round), "scores", `there is no round ${round}`);
  demand(story.draws.has(keyOf(name, round)), "scores", `${name} was scored and never drawn`);
  demand(!scores.has(round), "scores", `${name} is scored twice in a round`);
  checkScore(story, submission, score);
  if (isSalted) {
    checkOpenedScore(submission, score, salt);
    hidden.delete(round);
  }
  demand(!hidden.has(round), "scores", `the score of ${name} is shown unsalted`);
  if (isSalted) checkConclusion(story, submission, score);
  scores.set(round, score);
  checked.scores += 1;
}

/** Whether a score that was kept back is what its submission's state was concluded from. */
function checkConclusion(story: Story, submission: Submission, score: Score): void {
  const { name, state, reason } = submission;
  if (state === SCORED) {
    const isScored = score.outcome === ScoreOutcome.SCORE_OUTCOME_SCORED;
    demand(isScored, "scores", `${name} is scored, and the score that was kept back says otherwise`);
  } else if (wasJudged(story, submission, reason)) {
    const otherwise = `${name} is rejected for another reason than the score that was kept back gives`;
    demand(gives(score, reason), "scores", otherwise);
  }
}

/** Submissions that were rejected with a task which was never cancelled: the leaf, and what is wrong with it. */
export function cancelledWithoutTheirTask({ submissions }: Story): { index: number; reason: string }[] {
  return [...submissions.values()]
    .filter(({ reason }) => reason === RejectionReason.REJECTION_REASON_TASK_CANCELLED)
    .filter(({ task }) => task.state !== TaskState.TASK_STATE_CANCELLED)
    .map(({ name, task, endIndex }) => ({
      index: endIndex,
      reason: `${name} is rejected as cancelled, and ${task.name} is not`,
    }));
}

/** The round that ranks a task whose submissions have all ended. Throws Wrong when they have not. */
export function rankingRound(story: Story, task: Task): number {
  const mine = [...story.submissions.values()].filter((each) => each.task === task);
  for (const each of mine) {
    const hasEnded = each.state === SCORED || each.state === REJECTED;
    demand(hasEnded, "history", `${task.name} is final, ${each.name} has not ended`);
    const otherwise = `${task.name} is final, and the score of ${each.name} was never opened`;
    demand(each.hidden.size === 0, "scores", otherwise);
    checkFirst(each, mine);
  }
  const isTold = task.isHoldoutTold || task.config.holdout === undefined;
  demand(isTold, "history", `${task.name} is final, and nothing is said of its holdout`);
  if (task.holdoutLeaf.length === 0) return FIRST_ROUND;
  const scored = mine.filter(({ state }) => state === SCORED);
  const isScored = (score: Score | undefined) => score?.outcome === ScoreOutcome.SCORE_OUTCOME_SCORED;
  const isJudged = scored.length === 0 || scored.some(({ scores }) => isScored(scores.get(HOLDOUT_ROUND)));
  return isJudged ? HOLDOUT_ROUND : FIRST_ROUND;
}

/** Throws Wrong for a scored copy: of those revealed the earliest commit owns a model. */
function checkFirst(submission: Submission, allOfTask: readonly Submission[]): void {
  const { reveal, state, number, name, commit } = submission;
  if (state !== SCORED || !reveal) return;
  for (const other of allOfTask) {
    const isSame = other.reveal !== undefined && equal(other.reveal.modelDigest, reveal.modelDigest);
    // Who failed through the platform's fault alone may submit the same model again.
    const isAgain =
      other.commit.participant === commit.participant &&
      other.reason === RejectionReason.REJECTION_REASON_VALIDATORS_UNAVAILABLE;
    const isOwned = isSame && other.number < number && !isAgain;
    demand(!isOwned, "history", `${name} is scored, and is a copy of ${other.name}`);
  }
}

function submissionOf(story: Story, name: string): Submission {
  const submission = story.submissions.get(name);
  demand(submission !== undefined, "history", `${name} was never committed`);
  return submission;
}
