/** Joining a task and submitting a model to it: the signed statements and their order. */

import { randomBytes } from "node:crypto";

import { newRequestId } from "./calling.js";
import type { Client } from "./client.js";
import { SALT_BYTES, submissionCommitment } from "./commitments.js";
import type { Member } from "./proto/tiltyard/registry/v1/membership.js";
import { ModelFormat } from "./proto/tiltyard/type/v1/model.js";
import type { Role } from "./proto/tiltyard/type/v1/participation.js";
import { COMMIT, JOIN, REVEAL, signStatement } from "./statements.js";
import { fileDigest, upload, type Progress } from "./transfers.js";

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

/** What has to be kept from before the commit until the reveal: without the salt a commitment cannot be opened. */
export interface Journal {
  task: string;
  modelDigest: Uint8Array;
  salt: Uint8Array;
  commitRequestId: string;
  revealRequestId: string;
}

/** The journal of a new submission of the model in a file. Keep it where it survives a crash before calling `submitModel`. */
export async function newJournal(task: string, model: string): Promise<Journal> {
  return {
    task,
    modelDigest: await fileDigest(model),
    salt: new Uint8Array(randomBytes(SALT_BYTES)),
    commitRequestId: newRequestId(),
    revealRequestId: newRequestId(),
  };
}

/**
 * Commits to the model in a file, uploads it, reveals it, and returns the submission's name.
 *
 * Calling again with the same journal, after a crash at any point, goes on with the same submission. Throws ArenaError.
 */
export async function submitModel(
  client: Client,
  journal: Journal,
  model: { path: string; index?: number; format?: ModelFormat },
  progress?: Progress,
): Promise<string> {
  const { origin, participant, key } = client;
  const { task, modelDigest, salt } = journal;
  const commitment = submissionCommitment({ origin, task, participant, modelDigest, salt });
  const committed = await client.submissions.commitSubmission({
    statement: signStatement(key, COMMIT, { origin, task, participant, commitment }),
    requestId: journal.commitRequestId,
  });
  const submission = committed.submission?.name;
  if (!submission) throw new Error("the registry answered without a submission");
  await upload(client, model.path, { $case: "submission", value: submission }, progress, modelDigest);
  const format = model.format ?? ModelFormat.MODEL_FORMAT_SAFETENSORS;
  await client.submissions.revealSubmission({
    statement: signStatement(key, REVEAL, {
      origin,
      submission,
      modelDigest,
      salt,
      format,
      modelIndex: model.index ?? 0,
    }),
    requestId: journal.revealRequestId,
  });
  return submission;
}
