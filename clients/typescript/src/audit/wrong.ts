/** What an audit claims of a log, and what it throws where a leaf belies it. */

/** What holds in a log that passes; docs/transparency.md tells how each is checked. */
export const CLAIMS = {
  root: "the checkpoint's root is the root of all leaves, and its note is signed",
  envelopes: "every envelope in the log is signed by whom it names",
  history: "every task, membership, submission and assignment goes the way that the rules allow",
  verdicts: "every eligibility verdict follows from its evidence",
  ledger: "every balance, weight and charge follows from the ledger's events before it",
  commitments: "every revealed model is the one committed to",
  draws: "every draw follows from the reveal, the selector's signature and the pool",
  pools: "every draw's pool root is that of the pool which the ledger's events give",
  seals: "every opened report is the one sealed",
  scores: "every score is the lower median of the opened reports",
  leaderboards: "the leaderboard follows from the scores",
} as const;

export type Claim = keyof typeof CLAIMS;

/** A leaf that does not follow from the leaves before it. */
export class Wrong extends Error {
  override readonly name = "Wrong";

  constructor(
    readonly claim: Claim,
    reason: string,
  ) {
    super(reason);
  }
}

/** Throws Wrong unless it holds. */
export function demand(holds: boolean, claim: Claim, otherwise: string): asserts holds {
  if (!holds) throw new Wrong(claim, otherwise);
}

/** What was thrown, in words. */
export function told(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
