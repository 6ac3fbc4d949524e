/** Validators' duties, step by step: leases, the faults that end them, and what these cost. */

import type { DrawReceipt } from "../proto/tiltyard/type/v1/draw.js";
import { AssignmentState, ValidatorFaultKind } from "../proto/tiltyard/type/v1/evaluation.js";
import type { AssignmentChanged, ValidatorFault } from "../proto/tiltyard/type/v1/log.js";
import { LedgerEventKind, StakeFault, type LedgerEvent } from "../proto/tiltyard/type/v1/stake.js";
import { demandName } from "./names.js";
import { demandJoined } from "./memberships.js";
import type { Reading } from "./reading.js";
import { FIRST_ROUND, HOLDOUT_ROUND, keyOf, type Duty, type Story } from "./story.js";
import { demand } from "./wrong.js";

const OFFERED = AssignmentState.ASSIGNMENT_STATE_OFFERED;
const ACCEPTED = AssignmentState.ASSIGNMENT_STATE_ACCEPTED;
const SEALED = AssignmentState.ASSIGNMENT_STATE_SEALED;
const OPENED = AssignmentState.ASSIGNMENT_STATE_OPENED;
const DECLINED = AssignmentState.ASSIGNMENT_STATE_DECLINED;
const EXPIRED = AssignmentState.ASSIGNMENT_STATE_EXPIRED;
const RELEASED = AssignmentState.ASSIGNMENT_STATE_RELEASED;
const { VALIDATOR_FAULT_KIND_OUTLIER: OUTLIER } = ValidatorFaultKind;

// What an AssignmentChanged may say after which state, and which fault an expiry then owes; sealing and opening have leaves
// of their own.
const STEPS = new Map<AssignmentState, { to: readonly AssignmentState[]; owed: ValidatorFaultKind }>([
  [OFFERED, { to: [ACCEPTED, DECLINED, EXPIRED, RELEASED], owed: ValidatorFaultKind.VALIDATOR_FAULT_KIND_OFFER_EXPIRED }],
  [ACCEPTED, { to: [DECLINED, EXPIRED, RELEASED], owed: ValidatorFaultKind.VALIDATOR_FAULT_KIND_LEASE_EXPIRED }],
  [SEALED, { to: [EXPIRED, RELEASED], owed: ValidatorFaultKind.VALIDATOR_FAULT_KIND_SEAL_UNOPENED }],
]);
const LOCKS = [LedgerEventKind.LEDGER_EVENT_KIND_LOCKED, LedgerEventKind.LEDGER_EVENT_KIND_UNLOCKED];
const SLASHED_FOR = new Map<StakeFault, ValidatorFaultKind>([
  [StakeFault.STAKE_FAULT_SEAL_MISSING, ValidatorFaultKind.VALIDATOR_FAULT_KIND_LEASE_EXPIRED],
  [StakeFault.STAKE_FAULT_SEAL_NOT_OPENED, ValidatorFaultKind.VALIDATOR_FAULT_KIND_SEAL_UNOPENED],
  [StakeFault.STAKE_FAULT_REPORT_OUTSIDE_TOLERANCE, OUTLIER],
]);

/** One step of a validator's duty. */
export function assigned({ story, checked }: Reading, index: number, entry: AssignmentChanged): void {
  const { assignment: name, state, position, deadline } = entry;
  const { submission, round, validator } = parts(name, "/assignments/");
  const duty = story.duties.get(name);
  if (!duty) {
    const picks = story.draws.get(keyOf(submission, round))?.receipt.picks ?? [];
    const isDrawn = picks[position]?.participant === validator;
    demand(isDrawn, "history", `${name} is given to somebody who was not drawn for position ${position}`);
    const begins = state === OFFERED || state === RELEASED;
    demand(begins, "history", `${name} begins with something else than an offer`);
    story.duties.set(name, { state, position, index, owed: 0 });
  } else {
    const steps = STEPS.get(duty.state);
    demand(steps !== undefined, "history", `${name} had ended, and goes on`);
    demand(steps.to.includes(state), "history", `${name} makes a step that there is not`);
    demand(position === duty.position, "history", `${name} moves to another place in the draw's order`);
    if (state === ACCEPTED) demandJoined(story, story.submissions.get(submission)!.task.name, validator);
    Object.assign(duty, { owed: state === EXPIRED ? steps.owed : 0, state, index } satisfies Partial<Duty>);
  }
  const hasEnded = state !== OFFERED && state !== ACCEPTED;
  demand(deadline === undefined || !hasEnded, "history", `${name} has ended, and has a deadline`);
  checked.history += 1;
}

/** A lease ends with a seal. */
export function seal(story: Story, name: string, evaluation: string): void {
  const duty = story.duties.get(name);
  demand(duty?.state === ACCEPTED, "history", `${evaluation} is sealed without a lease`);
  duty!.state = SEALED;
}

/** A sealed duty is done. */
export function openReport(story: Story, name: string, evaluation: string): void {
  const duty = story.duties.get(name);
  demand(duty?.state === SEALED, "seals", `${evaluation} is opened, and its duty had ended without a report`);
  duty!.state = OPENED;
}

/** A validator did not do its duty, or did it wrongly. */
export function faulted({ story, checked }: Reading, { assignment: name, kind }: ValidatorFault): void {
  const { submission, round } = parts(name, "/assignments/");
  const duty = story.duties.get(name);
  demand(duty !== undefined, "history", `${name} was never given to anybody`);
  if (kind === OUTLIER) {
    story.outliers(submission, round).add(name.replaceAll("/assignments/", "/evaluations/"));
  } else {
    demand(kind === duty.owed, "history", `${name} is named at fault for what did not happen`);
    duty.owed = 0;
  }
  demand(!story.faults.has(keyOf(name, kind)), "history", `${name} is named at fault twice`);
  story.faults.add(keyOf(name, kind));
  checked.history += 1;
}

/** Duties that expired and whose fault is in no leaf: the leaf of the expiry, and what is wrong with it. */
export function unnamedFaults({ duties }: Story): { index: number; reason: string }[] {
  return [...duties]
    .filter(([, { owed }]) => owed)
    .map(([name, { index }]) => ({ index, reason: `${name} has expired, and no fault was named for it` }));
}

/** Whether what is slashed or given back has its reason in the leaves before. Throws Wrong. */
export function checkLedgerEvent(story: Story, event: LedgerEvent): void {
  const { participant, draw, reference, fault } = event;
  const id = participant.replace(/^participants\//, "");
  if (event.kind === LedgerEventKind.LEDGER_EVENT_KIND_QUOTA_REFUNDED) {
    const receipt = [...story.draws.values()].find((each) => each.receipt.draw === draw)?.receipt;
    demand(receipt !== undefined, "ledger", `${draw} is refunded, and was never drawn`);
    const isReleased = releaseOf(story, receipt, participant) !== undefined;
    demand(isReleased, "ledger", `${participant} is refunded for ${draw} without a release`);
  } else if (event.kind === LedgerEventKind.LEDGER_EVENT_KIND_SLASHED) {
    const kind = SLASHED_FOR.get(fault);
    if (kind === undefined) return;
    const isNamed = reference.endsWith(`-${id}`) && story.faults.has(keyOf(reference, kind));
    demand(isNamed, "ledger", `${participant} is slashed for a fault that no leaf names`);
  }
}

/** Whether whom and what an event is about can be. Throws Wrong. */
export function checkEventNames({ kind, participant, task, draw, reference }: LedgerEvent): void {
  // Stakes may be there before their holder has registered, so that no leaf has to name it before.
  if (kind !== LedgerEventKind.LEDGER_EVENT_KIND_POOL_CLOSED) demandName(participant, "participant", "ledger");
  if (task || LOCKS.includes(kind)) demandName(task, "task", "ledger");
  if (draw || kind === LedgerEventKind.LEDGER_EVENT_KIND_QUOTA_CHARGED) demandName(draw, "draw", "ledger");
  if (kind === LedgerEventKind.LEDGER_EVENT_KIND_OWNER_GROUPS_MERGED) demandName(reference, "participant", "ledger");
}

/** The leaf that released somebody from the duty that a draw brought; undefined where none did. */
export function releaseOf({ duties }: Story, { submission, round }: DrawReceipt, participant: string): number | undefined {
  const duty = duties.get(`${submission}/assignments/${round}-${participant.replace(/^participants\//, "")}`);
  return duty?.state === RELEASED ? duty.index : undefined;
}

/** Submission, round and validator of an assignment's or evaluation's name. Throws Wrong. */
export function parts(
  name: string,
  middle: "/assignments/" | "/evaluations/",
): { submission: string; round: number; validator: string } {
  const at = name.indexOf(middle);
  // A round is written in one way: under two names one validator would have two votes.
  const found = at < 0 ? null : /^([0-9]+)-(.+)$/s.exec(name.slice(at + middle.length));
  const [, round = "", validator = ""] = found ?? [];
  const isName = [FIRST_ROUND, HOLDOUT_ROUND].map(String).includes(round);
  demand(isName, "history", `${name} is no name`);
  return { submission: name.slice(0, at), round: Number(round), validator: `participants/${validator}` };
}
