/** Resource names that only the log's keeper wrote: that each has the form of what it names. */

import { demand, type Claim } from "./wrong.js";

const FORMS = {
  participant: /^participants\/[0-9a-f]{40}$/,
  task: /^tasks\/[a-z0-9-]{1,63}$/,
  artifact: /^artifacts\/[0-9a-f]{64}$/,
  draw: /^draws\/[a-z0-9-]{1,100}$/,
} as const;

/** Throws Wrong for a text that can name nothing of the kind. */
export function demandName(name: string, kind: keyof typeof FORMS, claim: Claim): void {
  demand(FORMS[kind].test(name), claim, `'${name}' is no name of a ${kind}`);
}
