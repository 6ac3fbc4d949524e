/** The arena: its beginning, its outages, its participants with their owners, and who endorses whom. */

import { PublicKey } from "../bls.js";
import { participantId } from "../identity.js";
import type {
  EndorsementChanged,
  Genesis,
  OutageEnded,
  OwnerBound,
  ParticipantRegistered,
} from "../proto/tiltyard/type/v1/log.js";
import { ENDORSEMENT, OWNER } from "../statements.js";
import { momentNs } from "./moments.js";
import { demandName } from "./names.js";
import type { Reading } from "./reading.js";
import { keyOf } from "./story.js";
import { demand } from "./wrong.js";

/** The first leaf names the arena and its keys. */
export function began({ story }: Reading, { origin, selectorKey, operators }: Genesis): void {
  story.origin = origin;
  story.selector = PublicKey.from(selectorKey);
  for (const operator of operators) demandName(operator, "participant", "history");
}

/** The registry is back, at the time of this leaf. */
export function outageEnded({ timeNs }: Reading, { back, lastAlive }: OutageEnded): void {
  const backNs = momentNs(back, "history", "the end of an outage");
  const holds = backNs === timeNs && momentNs(lastAlive, "history", "the beginning of an outage") < backNs;
  demand(holds, "history", "an outage ends at another time than it is told, or before it began");
}

/** Somebody registers, under the id of the key. */
export function participantRegistered({ story }: Reading, entry: ParticipantRegistered): void {
  const { participant, publicKey, displayName } = entry;
  const isItsKeys = participant === `participants/${participantId(publicKey)}`;
  demand(isItsKeys, "history", `${participant} is not the id of its key`);
  story.participants.set(participant, displayName);
}

/** An owner vouches for a participant. */
export function ownerBound(reading: Reading, entry: OwnerBound): void {
  // An owner vouches with a key of its own, and takes part in nothing.
  const { statement, signer } = reading.open(entry.statement, OWNER, { byParticipant: false });
  const { owner, participant } = statement;
  const isKnown = reading.story.participants.has(participant);
  demand(isKnown, "history", `${participant} is owned, and has not registered`);
  demand(owner === signer, "envelopes", `${owner} did not sign, ${signer} did`);
  reading.story.owners.set(participant, owner);
}

/** A participant endorses another in a field, or takes that back. */
export function endorsementChanged(reading: Reading, entry: EndorsementChanged): void {
  const { statement, signer } = reading.open(entry.statement, ENDORSEMENT);
  const { endorser, subject, field, revoke } = statement;
  demand(endorser === signer, "envelopes", `${endorser} did not sign, ${signer} did`);
  const isKnown = reading.story.participants.has(subject);
  demand(isKnown, "history", `${subject} is endorsed, and has not registered`);
  if (revoke) return;
  reading.story.endorsements.add(keyOf(endorser, subject, field));
  reading.story.endorsed.add(keyOf(endorser, subject));
}
