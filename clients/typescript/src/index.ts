/** Client of a Tiltyard arena, and the checks that need no trust in its servers. */

export { newRequestId } from "./calling.js";
export { Client, Node, type ArenaCallOptions, type ArenaOptions } from "./client.js";
export { InvalidPem, type TlsOptions } from "./tls.js";
export { ArenaError, type FieldViolation } from "./errors.js";
export { Status } from "nice-grpc";
export { Key, TokenSource, issueToken, participantId } from "./identity.js";
export { COMMIT, ENDORSEMENT, JOIN, OWNER, REPORT, REVEAL, SEAL, openStatement, signStatement } from "./statements.js";
export { drawSeed, evaluationSeal, holdoutAnchor, scoreCommitment, submissionCommitment } from "./commitments.js";
export { joinTask, submitModel, type Model } from "./submitting.js";
export { JournalMismatch, readJournal, type Journal } from "./journal.js";
export {
  DigestMismatch,
  download,
  fileDigest,
  upload,
  type Progress,
  type Purpose,
  type TransferOptions,
} from "./transfers.js";
export { pages, persist, watch, type Patient } from "./watching.js";
export type { WatchOptions } from "./silence.js";
export { ReceiptInvalid, receiptFromJson, verifyReceipt } from "./receipts.js";
export { checkOrder, drawId, drawnMember, drawnValue } from "./sortition.js";
export { Alarm, Witness, witnessed, type Seen, type Testimony } from "./witness.js";
export { WitnessKey, cosign, verifyCosignature } from "./cosigning.js";
export { audit, type Audit, type AuditOptions, type Failure } from "./audit/claims.js";
export { fetchShown } from "./audit/shown.js";
export { CLAIMS, type Claim } from "./audit/wrong.js";
export {
  InvalidRecord,
  RegistryLog,
  fetchRecord,
  readRecord,
  writeRecord,
  type LogSource,
  type RecordLog,
} from "./recordlog.js";
export {
  Frontier,
  InvalidNote,
  leafHash,
  openCheckpoint,
  verifyConsistency,
  verifyInclusion,
  type Checkpoint,
} from "./transparency.js";
