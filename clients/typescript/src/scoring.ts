/** What a submission's reports amount to: tolerance, dispute, score or fault. Integers only, one vote a report. */

/** One opened report that counts: what was counted, or the name of a fault. */
export interface Vote {
  validator: string;
  counts?: { correct: bigint; total: bigint; ambiguous: bigint };
  fault?: string;
}

/** `correct` and `total` are set with SCORED, `fault` with FAULT; `outliers` are ids in the order of the reports. */
export interface Conclusion {
  outcome: "SCORED" | "FAULT" | "AMBIGUOUS";
  tolerance: bigint;
  correct: bigint;
  total: bigint;
  fault: string;
  outliers: string[];
}

/** How many of k validators must have reported at least: ceil(2k/3). */
export function quorum(k: number): number {
  return Math.ceil((2 * k) / 3);
}

/**
 * What the opened reports of one submission in one round amount to, when no more validators are called in: a camp with more
 * than half of all votes is the majority, and whoever is not in it an outlier.
 *
 * A camp is one fault, or the counts within the tolerance of the lower median of all counts. The tolerance is the task's, or
 * the lower median of the rows too close to call where that is more. Throws RangeError for fewer votes than the quorum.
 */
export function conclude(votes: readonly Vote[], k: number, taskTolerance: bigint): Conclusion {
  if (votes.length < quorum(k)) throw new RangeError(`${votes.length} reports are fewer than the quorum of ${quorum(k)}`);
  const counts = votes.flatMap((vote) => (vote.counts ? [vote.counts] : []));
  const ambiguous = lowerMedian(counts, (each) => each.ambiguous)?.ambiguous ?? 0n;
  const tolerance = ambiguous > taskTolerance ? ambiguous : taskTolerance;
  const median = lowerMedian(counts, (each) => each.correct);
  const campOf = ({ counts: mine, fault }: Vote): string | undefined => {
    if (!mine || !median) return fault;
    const off = mine.correct - median.correct;
    return (off < 0n ? -off : off) <= tolerance ? COUNTS : undefined;
  };
  const camps = votes.map(campOf);
  const majority = camps.find((camp) => camp !== undefined && 2 * camps.filter((each) => each === camp).length > votes.length);
  const nothing = { tolerance, correct: 0n, total: 0n, fault: "", outliers: [] };
  if (majority === undefined) return { ...nothing, outcome: "AMBIGUOUS" };
  const outliers = votes.filter((_, at) => camps[at] !== majority).map(({ validator }) => validator);
  if (majority !== COUNTS || !median) return { ...nothing, outcome: "FAULT", fault: majority, outliers };
  return { ...nothing, outcome: "SCORED", correct: median.correct, total: median.total, outliers };
}

// Not a fault's name: those are in upper case.
const COUNTS = "counts";

function lowerMedian<T>(values: readonly T[], by: (value: T) => bigint): T | undefined {
  const sorted = [...values].sort((a, b) => (by(a) < by(b) ? -1 : by(a) > by(b) ? 1 : 0));
  return sorted[(sorted.length - 1) >> 1];
}

// The 97.5 % point of the normal distribution.
const Z_95 = 1.959963984540054;

/** The 95 % score interval of correct/total (Wilson 1927), for people: nothing is decided by it. */
export function wilsonInterval(correct: bigint, total: bigint): { low: number; high: number } {
  if (correct < 0n || correct > total || total < 1n) throw new RangeError(`${correct} of ${total} is no proportion`);
  const rows = Number(total);
  const share = Number(correct) / rows;
  const z2 = Z_95 * Z_95;
  const centre = (share + z2 / (2 * rows)) / (1 + z2 / rows);
  const margin = (Z_95 / (1 + z2 / rows)) * Math.sqrt((share * (1 - share)) / rows + z2 / (4 * rows * rows));
  return {
    low: correct === 0n ? 0 : Math.max(0, centre - margin),
    high: correct === total ? 1 : Math.min(1, centre + margin),
  };
}
