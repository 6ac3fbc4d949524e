/** The reading of a log: what the leaves so far say, when the leaf that is looked at was written, what was checked. */

import type { Envelope } from "../proto/tiltyard/type/v1/envelope.js";
import { openStatement, type StatementKind } from "../statements.js";
import { Story, type Task } from "./story.js";
import { CLAIMS, demand, type Claim } from "./wrong.js";

/** Where the reading stands. */
export class Reading {
  readonly story = new Story();
  /** How often each claim was checked. */
  readonly checked = Object.fromEntries(Object.keys(CLAIMS).map((claim) => [claim, 0])) as Record<Claim, number>;
  /** When the leaf that is looked at was written. */
  timeNs = 0n;

  /** The statement in an envelope and its signer as participants/{id}, who has registered; counted. */
  open<T extends { origin: string }>(
    envelope: Envelope | undefined,
    kind: StatementKind<T>,
    { byParticipant = true } = {},
  ): { statement: T; signer: string } {
    demand(envelope !== undefined, "envelopes", "the statement is missing");
    const { statement, signer } = openStatement(envelope, kind);
    const { origin } = statement;
    demand(origin === this.story.origin, "envelopes", `the statement is of another arena: ${origin}`);
    const isKnown = !byParticipant || this.story.participants.has(`participants/${signer}`);
    demand(isKnown, "envelopes", `the statement is signed by ${signer}, who has not registered`);
    this.checked.envelopes += 1;
    return { statement, signer: `participants/${signer}` };
  }

  /** A task that was created before. */
  task(name: string): Task {
    const task = this.story.tasks.get(name);
    demand(task !== undefined, "history", `${name} was never created`);
    return task;
  }
}
