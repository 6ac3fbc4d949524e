/** Statements that outlive their call: messages inside DSSE envelopes, each kind under a payload type of its own. */

import { Key, participantId, preAuthenticationEncoding, verifySignature } from "./identity.js";
import { readMessage, type Codec } from "./messages.js";
import {
  CommitStatement,
  EndorsementStatement,
  Envelope,
  EvaluationReport,
  JoinStatement,
  OwnerStatement,
  RevealStatement,
  SealStatement,
} from "./proto/tiltyard/type/v1/envelope.js";
import { checkTexts } from "./texts.js";

const MAX_PAYLOAD_BYTES = 64 * 1024;

/** What can be signed: the message's codec and its name within the payload type. */
export interface StatementKind<T> {
  readonly name: string;
  readonly codec: Codec<T>;
}

export const JOIN: StatementKind<JoinStatement> = { name: "join", codec: JoinStatement };
export const COMMIT: StatementKind<CommitStatement> = { name: "submission-commit", codec: CommitStatement };
export const REVEAL: StatementKind<RevealStatement> = { name: "submission-reveal", codec: RevealStatement };
export const SEAL: StatementKind<SealStatement> = { name: "evaluation-seal", codec: SealStatement };
export const REPORT: StatementKind<EvaluationReport> = { name: "evaluation-report", codec: EvaluationReport };
export const ENDORSEMENT: StatementKind<EndorsementStatement> = { name: "endorsement", codec: EndorsementStatement };
export const OWNER: StatementKind<OwnerStatement> = { name: "owner", codec: OwnerStatement };

/** The statement in a signed envelope. Throws RangeError with the path of a text that has half of a surrogate pair in it. */
export function signStatement<T>(key: Key, kind: StatementKind<T>, statement: T): Envelope {
  checkTexts(statement);
  const payloadType = payloadTypeOf(kind);
  const payload = kind.codec.encode(statement).finish();
  const signature = key.sign(preAuthenticationEncoding(payloadType, payload));
  return { payloadType, payload, signature, publicKey: key.publicKey };
}

/**
 * The statement in an envelope and the id of who signed it. Throws Error for another payload type, a bad signature, more than
 * 64 KiB, or bytes that are no statement of the kind, or may be read in two ways.
 */
export function openStatement<T>(envelope: Envelope, kind: StatementKind<T>): { statement: T; signer: string } {
  const expected = payloadTypeOf(kind);
  if (envelope.payload.length > MAX_PAYLOAD_BYTES) {
    throw new Error(`payload has ${envelope.payload.length} bytes, at most ${MAX_PAYLOAD_BYTES} are allowed`);
  }
  if (envelope.payloadType !== expected) {
    throw new Error(`payload type is ${envelope.payloadType}, expected ${expected}`);
  }
  const signed = preAuthenticationEncoding(envelope.payloadType, envelope.payload);
  if (!verifySignature(envelope.publicKey, signed, envelope.signature)) {
    throw new Error("the signature does not match");
  }
  return { statement: readMessage(kind.codec, envelope.payload), signer: participantId(envelope.publicKey) };
}

function payloadTypeOf(kind: { name: string }): string {
  return `application/vnd.tiltyard.${kind.name}.v1+protobuf`;
}
