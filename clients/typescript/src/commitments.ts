/** Hashes that bind somebody to something before it is shown (docs/commitments.md). */

import { bigEndian, sha256, utf8 } from "./bytes.js";

export const SALT_BYTES = 32;
const DIGEST_BYTES = 32;

/** SHA-256 over a tag and fields, each preceded by its length in four big-endian bytes. 32 bytes. */
export function taggedHash(tag: string, ...fields: Uint8Array[]): Uint8Array {
  return sha256(...[utf8(tag), ...fields].flatMap((field) => [bigEndian(field.length, 4), field]));
}

/**
 * What a training node commits to before it shows its model.
 *
 * `task` and `participant` are resource names; `modelDigest` (SHA-256 of the file) and `salt` have 32 bytes.
 */
export function submissionCommitment(fields: {
  origin: string;
  task: string;
  participant: string;
  modelDigest: Uint8Array;
  salt: Uint8Array;
}): Uint8Array {
  const { origin, task, participant, modelDigest, salt } = fields;
  checkLength("a digest", modelDigest, DIGEST_BYTES);
  checkLength("a salt", salt, SALT_BYTES);
  return taggedHash(
    "tiltyard/submission-commitment/v1",
    utf8(origin),
    utf8(task),
    utf8(participant),
    modelDigest,
    salt,
  );
}

/** What a validator seals before reports are opened; `report` is the payload of the report's envelope. */
export function evaluationSeal(fields: { assignment: string; report: Uint8Array; salt: Uint8Array }): Uint8Array {
  checkLength("a salt", fields.salt, SALT_BYTES);
  return taggedHash("tiltyard/evaluation-seal/v1", utf8(fields.assignment), fields.report, fields.salt);
}

/** The seed of a draw: from the selector's signature `sigma` and the salt of the reveal. */
export function drawSeed(fields: { sigma: Uint8Array; revealSalt: Uint8Array }): Uint8Array {
  checkLength("a salt", fields.revealSalt, SALT_BYTES);
  return taggedHash("tiltyard/draw-seed/v1", fields.sigma, fields.revealSalt);
}

/** What sigma is over in round 2: the hash of the leaf that accepted the holdout, and the submission (a resource name). */
export function holdoutAnchor(fields: { holdoutLeaf: Uint8Array; submission: string }): Uint8Array {
  return taggedHash("tiltyard/holdout-anchor/v1", fields.holdoutLeaf, utf8(fields.submission));
}

/** What the log holds of a score until its task is closed, where the task hides it; `score` is the message's bytes. */
export function scoreCommitment(fields: { score: Uint8Array; salt: Uint8Array }): Uint8Array {
  checkLength("a salt", fields.salt, SALT_BYTES);
  return taggedHash("tiltyard/score-commitment/v1", fields.score, fields.salt);
}

function checkLength(what: string, bytes: Uint8Array, length: number): void {
  if (bytes.length !== length) throw new RangeError(`${what} has ${length} bytes, not ${bytes.length}`);
}
