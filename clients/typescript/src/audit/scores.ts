/** Scores concluded again from the opened reports. */

import { isDeepStrictEqual } from "node:util";

import { equal } from "../bytes.js";
import { SALT_BYTES, scoreCommitment } from "../commitments.js";
import type { EvaluationReport } from "../proto/tiltyard/type/v1/envelope.js";
import { ModelFault, Score, ScoreOutcome } from "../proto/tiltyard/type/v1/evaluation.js";
import { conclude, type Vote } from "../scoring.js";
import type { Story, Submission } from "./story.js";
import { Wrong, demand, told } from "./wrong.js";

/** Concludes a round again. Throws Wrong with what differs. */
export function checkScore(story: Story, { name, task }: Submission, score: Score): void {
  const counted = new Map([...story.reports(name, score.round)].filter(([, report]) => !report.nodeEndpoint));
  const isAll =
    counted.size > 0 &&
    score.evaluations.length === counted.size &&
    new Set(score.evaluations).size === counted.size &&
    score.evaluations.every((each) => counted.has(each));
  demand(isAll, "scores", `the score of ${name} counts other evaluations than were opened, or one twice`);
  const votes = score.evaluations.map((each) => vote(each, counted.get(each)!));
  let result;
  try {
    result = conclude(votes, task.config.validatorsPerSubmission, task.config.tolerance);
  } catch (error) {
    throw new Wrong("scores", `the score of ${name}: ${told(error)}`);
  }
  const { outcome, correct, total, tolerance, outliers } = result;
  const expected = Score.fromPartial({
    outcome: ScoreOutcome[`SCORE_OUTCOME_${outcome}`],
    correct,
    total,
    fault: ModelFault[`MODEL_FAULT_${result.fault || "UNSPECIFIED"}` as keyof typeof ModelFault],
    tolerance,
    evaluations: score.evaluations,
    outliers,
    round: score.round,
  });
  // As bytes: what a later registry says of a score, unknown here, does not follow from the reports.
  const follows = equal(Score.encode(expected).finish(), Score.encode(score).finish());
  const otherwise = `${name} was scored ${shown(score)}, the lower median and the tolerance give ${shown(expected)}`;
  demand(follows, "scores", otherwise);
  const isNamed = isDeepStrictEqual(story.outliers(name, score.round), new Set(outliers));
  demand(isNamed, "scores", `the outliers of ${name} are not those who were named at fault`);
}

/** Whether a score that was hidden is the one that was committed to. Throws Wrong. */
export function checkOpenedScore({ name, hidden }: Submission, score: Score, salt: Uint8Array): void {
  const commitment = hidden.get(score.round);
  demand(commitment !== undefined, "scores", `a hidden score of ${name} is opened, which was never committed to`);
  const isSized = salt.length === SALT_BYTES;
  const holds = isSized && equal(scoreCommitment({ score: Score.encode(score).finish(), salt }), commitment);
  demand(holds, "scores", `the score of ${name} is not the one committed to`);
}

function vote(name: string, { finding }: EvaluationReport): Vote {
  if (finding?.$case === "counts") {
    const { correct, total } = finding.value;
    const addsUp = correct >= 0n && correct <= total && total > 0n;
    demand(addsUp, "scores", `the counts of ${name} do not add up`);
    return { validator: name, counts: finding.value };
  }
  const fault: string | undefined = ModelFault[finding?.value ?? ModelFault.MODEL_FAULT_UNSPECIFIED];
  demand(fault !== undefined, "scores", `${name} names a fault that there is not`);
  return { validator: name, fault: fault.replace("MODEL_FAULT_", "") };
}

function shown({ outcome, fault, correct, total, tolerance, outliers }: Score): string {
  const said = (ScoreOutcome[outcome] ?? String(outcome)).replace("SCORE_OUTCOME_", "");
  const found = fault ? (ModelFault[fault] ?? String(fault)).replace("MODEL_FAULT_", "") : `${correct}/${total}`;
  return `${said} ${found} (tolerance ${tolerance}${outliers.length ? `, ${outliers.length} outliers` : ""})`;
}
