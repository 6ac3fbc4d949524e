/** Joining a task and submitting a model to it: the signed statements and their order. */

import { fromHex, toHex } from "./bytes.js";
import { newRequestId } from "./calling.js";
import type { Client } from "./client.js";
import { submissionCommitment } from "./commitments.js";
import { beginJournal, writeJournal, type Journal } from "./journal.js";
import type { Member } from "./proto/tiltyard/registry/v1/membership.js";
import { ModelFormat } from "./proto/tiltyard/type/v1/model.js";
import type { Role } from "./proto/tiltyard/type/v1/participation.js";
import { COMMIT, JOIN, REVEAL, signStatement } from "./statements.js";
import { fileDigest, upload, type TransferOptions } from "./transfers.js";
import { persist } from "./watching.js";

/** Joins a task in one role. Throws ArenaError, for example with the reason NOT_ELIGIBLE. */
export async function joinTask(client: Client, task: string, role: Role): Promise<Member> {
  const statement = signStatement(client.key, JOIN, {
    origin: client.origin,
    task,
    participant: client.participant,
    role,
  });
  const { member } = await client.memberships.joinTask({ statement, requestId: newRequestId() });
  if (!member) throw new Error("the registry answered without a member");
  return member;
}

/** A model to submit: its file, the task, and the file of the journal that this submission goes on from. */
export interface Model {
  task: string;
  path: string;
  journal: string;
  /** Which of the task's models this is, 0 where left out. */
  index?: number;
  /** Layout of the file, safetensors where left out. */
  format?: ModelFormat;
}

/**
 * Commits to the model in a file, uploads it, reveals it, and returns the submission's name.
 *
 * Salt and request ids are in the journal (mode 0600) before the first call, so that calling again with the same journal,
 * after a crash at any point, goes on with the same submission and never makes a second one. Index and format may be others
 * until the registry has taken the reveal: a mistyped one costs no second submission. Throws JournalMismatch for the journal
 * of something else, ArenaError for what the registry refuses.
 */
export async function submitModel(client: Client, model: Model, options: TransferOptions = {}): Promise<string> {
  const { signal } = options;
  const digest = await fileDigest(model.path, signal);
  let begun = await beginJournal(model.journal, {
    origin: client.origin,
    task: model.task,
    participant: client.participant,
    modelDigest: toHex(digest),
    modelIndex: model.index ?? 0,
    modelFormat: model.format ?? ModelFormat.MODEL_FORMAT_SAFETENSORS,
  });
  if (!begun.submission) {
    begun = { ...begun, submission: await commit(client, begun, signal) };
    await writeJournal(model.journal, begun);
  }
  if (!begun.revealed) {
    await upload(client, model.path, { $case: "submission", value: begun.submission }, { ...options, digest });
    await reveal(client, begun, signal);
    await writeJournal(model.journal, { ...begun, revealed: true });
  }
  return begun.submission;
}

async function commit(client: Client, begun: Journal, signal: AbortSignal | undefined): Promise<string> {
  const { origin, task, participant } = begun;
  const [modelDigest, salt] = [fromHex(begun.modelDigest), fromHex(begun.salt)];
  const commitment = submissionCommitment({ origin, task, participant, modelDigest, salt });
  const request = {
    statement: signStatement(client.key, COMMIT, { origin, task, participant, commitment }),
    requestId: begun.commitRequestId,
  };
  const { submission } = await persist(() => client.submissions.commitSubmission(request, { signal }), { signal });
  if (!submission?.name) throw new Error("the registry answered without a submission");
  return submission.name;
}

async function reveal(client: Client, begun: Journal, signal: AbortSignal | undefined): Promise<void> {
  const request = {
    statement: signStatement(client.key, REVEAL, {
      origin: begun.origin,
      submission: begun.submission,
      modelDigest: fromHex(begun.modelDigest),
      salt: fromHex(begun.salt),
      format: begun.modelFormat,
      modelIndex: begun.modelIndex,
    }),
    requestId: begun.revealRequestId,
  };
  await persist(() => client.submissions.revealSubmission(request, { signal }), { signal });
}
