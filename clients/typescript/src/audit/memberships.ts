/** Eligibility verdicts held against their evidence, and memberships against the verdicts. */

import { SubmissionState } from "../proto/tiltyard/type/v1/evaluation.js";
import type { MembershipChanged } from "../proto/tiltyard/type/v1/log.js";
import {
  EvidenceKind,
  MembershipState,
  Role,
  type EligibilityVerdict,
  type Evidence,
} from "../proto/tiltyard/type/v1/participation.js";
import { JOIN } from "../statements.js";
import { momentNs } from "./moments.js";
import { demandName } from "./names.js";
import type { Reading } from "./reading.js";
import { keyOf, type Story } from "./story.js";
import { demand } from "./wrong.js";

const ACTIVE = MembershipState.MEMBERSHIP_STATE_ACTIVE;
const PAUSED = MembershipState.MEMBERSHIP_STATE_PAUSED;
const LEFT = MembershipState.MEMBERSHIP_STATE_LEFT;
const REFUSED = MembershipState.MEMBERSHIP_STATE_REFUSED;
const STEPS = new Map<MembershipState, readonly MembershipState[]>([
  [ACTIVE, [PAUSED, LEFT]],
  [PAUSED, [ACTIVE, LEFT]],
]);

/** Decides again from the evidence; the stake that it names waits for the ledger. */
export function verdictGiven({ story }: Reading, index: number, verdict: EligibilityVerdict): void {
  const { participant, task, role, eligible, evidence, decideTime } = verdict;
  const what = `the verdict on ${participant} in ${task}`;
  demandName(task, "task", "history");
  demand(story.participants.has(participant), "history", `${what} is about nobody who has registered`);
  const decideTimeNs = momentNs(decideTime, "verdicts", what);
  for (const fact of evidence) {
    demand(fact.sufficient === suffices(story, verdict, fact), "verdicts", `${what} weighs its evidence wrongly`);
  }
  checkThreshold(story, verdict);
  const follows = eligible === evidence.some(({ sufficient }) => sufficient);
  demand(follows, "verdicts", `${what} does not follow from its evidence`);
  story.verdicts.push({ index, verdict, decideTimeNs });
  if (eligible) story.eligible.add(keyOf(task, participant, role));
  if (role === Role.ROLE_TASK_CREATOR) {
    const reputation = evidence.filter(({ kind }) => kind === EvidenceKind.EVIDENCE_KIND_REPUTATION);
    story.vouchers.set(keyOf(task, participant), new Set(reputation.flatMap(({ references }) => references)));
  }
}

/** The amounts that a verdict says were available. */
export function stakesWeighed({ evidence }: EligibilityVerdict): bigint[] {
  return evidence.filter(({ kind }) => kind === EvidenceKind.EVIDENCE_KIND_STAKE).map(({ amountMicros }) => amountMicros);
}

/** Throws Wrong unless a verdict let this participant have this role. */
export function demandEligible(story: Story, task: string, participant: string, role: Role): void {
  const isEligible = story.eligible.has(keyOf(task, participant, role));
  demand(isEligible, "verdicts", `${participant} takes part in ${task} without a verdict that it may`);
}

/** Whether those whose word let a task be created gave it in the task's field. Throws Wrong. */
export function checkField(story: Story, task: string, creator: string, field: string): void {
  for (const endorser of story.vouchers.get(keyOf(task, creator)) ?? []) {
    const isKnown = story.endorsements.has(keyOf(endorser, creator, field));
    demand(isKnown, "verdicts", `${endorser} has never endorsed ${creator} in ${task}'s field`);
  }
}

/** Somebody enters a task at their own signed wish, pauses, goes on, or leaves. */
export function membershipChanged(reading: Reading, entry: MembershipChanged): void {
  const { task: name, participant, role, state, statement } = entry;
  const { creator } = reading.task(name);
  if (statement) {
    const { statement: said, signer } = reading.open(statement, JOIN);
    const isAsked = said.task === name && said.participant === participant && said.role === role;
    demand(isAsked, "envelopes", `${signer} asked for another task or role, or for somebody else`);
    demand(said.participant === signer, "envelopes", `${said.participant} did not sign, ${signer} did`);
  }
  const { story } = reading;
  const key = keyOf(name, participant);
  const before = story.members.get(key) ?? { role, state: LEFT };
  const step = `${participant} makes a step in ${name} that there is not`;
  if (before.state === LEFT || before.state === REFUSED) {
    demand(statement !== undefined, "history", `${participant} enters ${name} without having asked for it`);
    demand(state === ACTIVE || state === REFUSED, "history", step);
  } else {
    demand(STEPS.get(before.state)?.includes(state) ?? false, "history", step);
  }
  const isSame = before.state === REFUSED || before.role === role;
  demand(isSame && participant !== creator, "history", `${participant} has another role in ${name}`);
  if (state === ACTIVE || state === PAUSED) demandEligible(story, name, participant, role);
  story.members.set(key, { role, state });
  reading.checked.history += 1;
}

/** Throws Wrong unless somebody is, or was, a validator of the task. Who has left ends what was begun. */
export function demandJoined({ members }: Story, task: string, validator: string): void {
  const member = members.get(keyOf(task, validator));
  const isJoined = member?.role === Role.ROLE_VALIDATOR && member.state !== REFUSED;
  demand(isJoined, "history", `${validator} accepts a duty in ${task}, and has not joined it as validator`);
}

function suffices(story: Story, { participant }: EligibilityVerdict, fact: Evidence): boolean {
  switch (fact.kind) {
    case EvidenceKind.EVIDENCE_KIND_STAKE:
      demand(fact.references.length === 0, "verdicts", `a stake of ${participant} refers to something else`);
      return fact.amountMicros >= fact.thresholdMicros;
    case EvidenceKind.EVIDENCE_KIND_TRACK_RECORD:
      for (const name of fact.references) checkTrackRecord(story, participant, name);
      return fact.references.length > 0;
    case EvidenceKind.EVIDENCE_KIND_REPUTATION:
      for (const endorser of fact.references) {
        const isKnown = story.endorsed.has(keyOf(endorser, participant));
        demand(isKnown, "verdicts", `${endorser} has never endorsed ${participant}`);
      }
      return fact.references.length > 0;
    default:
      return false;
  }
}

/** The task's minimum; a task creator's is the arena's, which no leaf holds. */
function checkThreshold(story: Story, { task: name, role, participant, evidence }: EligibilityVerdict): void {
  const task = story.tasks.get(name);
  if (!task || role === Role.ROLE_TASK_CREATOR) return;
  const { selection } = task.config;
  const isValidator = role === Role.ROLE_VALIDATOR;
  const minimum = (isValidator ? selection?.validatorMinStakeMicros : selection?.trainingNodeMinStakeMicros) ?? 0n;
  for (const { kind, thresholdMicros } of evidence) {
    if (kind !== EvidenceKind.EVIDENCE_KIND_STAKE) continue;
    const otherwise = `${participant} is held against ${thresholdMicros}, ${name} asks ${minimum}`;
    demand(thresholdMicros === minimum, "verdicts", otherwise);
  }
}

function checkTrackRecord(story: Story, participant: string, name: string): void {
  const [submissionName = ""] = name.split("/evaluations/", 1);
  const submission = story.submissions.get(submissionName);
  demand(submission !== undefined, "verdicts", `the track record ${name} is of no submission`);
  const isInside = story.group(participant).has(submission.task.creator);
  demand(!isInside, "verdicts", `the track record ${name} is of the participant's own task`);
  if (name.includes("/evaluations/")) {
    const isMine = name.endsWith(`-${participant.replace(/^participants\//, "")}`) && story.seals.has(name);
    demand(isMine, "verdicts", `${name} is no evaluation by ${participant}`);
    const round = Number.parseInt(name.slice(name.lastIndexOf("/") + 1), 10);
    // Where the task hides its counts, the report is no leaf yet.
    const opened = story.reports(submissionName, round);
    const isAgreed = !story.outliers(submissionName, round).has(name) && (opened.size === 0 || opened.has(name));
    demand(isAgreed, "verdicts", `${name} was no evaluation within the tolerance`);
    return;
  }
  const isScored = submission.state === SubmissionState.SUBMISSION_STATE_SCORED;
  const isMine = submission.commit.participant === participant;
  demand(isScored && isMine, "verdicts", `${name} is no scored submission of ${participant}`);
}
