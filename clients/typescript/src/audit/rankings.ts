/** Leaderboards made again from the scores in the log. */

import { Leaderboard, LeaderboardEntry } from "../proto/tiltyard/registry/v1/leaderboard.js";
import { ScoreOutcome, SubmissionState, type Score } from "../proto/tiltyard/type/v1/evaluation.js";
import { TaskState } from "../proto/tiltyard/type/v1/task.js";
import { wilsonInterval } from "../scoring.js";
import type { Story, Submission } from "./story.js";

const INTERVAL_ERROR = 1e-9;

/** The ranking that the scores give; undefined while the task hides them, or for an unknown task. */
export function leaderboard(story: Story, taskName: string): Leaderboard | undefined {
  const task = story.tasks.get(taskName);
  if (!task || task.hides) return undefined;
  const best = new Map<string, { submission: Submission; score: Score }>();
  const counted = new Map<string, number>();
  // In the order of their numbers, so that of equal scores the earlier stays.
  for (const submission of story.submissions.values()) {
    const score = submission.scores.get(task.rankingRound);
    const isScored = submission.state === SubmissionState.SUBMISSION_STATE_SCORED && submission.task === task;
    if (!isScored || score?.outcome !== ScoreOutcome.SCORE_OUTCOME_SCORED) continue;
    const { participant } = submission.commit;
    counted.set(participant, (counted.get(participant) ?? 0) + 1);
    const before = best.get(participant);
    if (!before || score.correct > before.score.correct) best.set(participant, { submission, score });
  }
  const ranked = [...best.values()].sort((a, b) => {
    if (a.score.correct !== b.score.correct) return a.score.correct > b.score.correct ? -1 : 1;
    return a.submission.number - b.submission.number;
  });
  const entries = ranked.map(({ submission, score: { correct, total } }, at) => {
    const { participant } = submission.commit;
    const { low, high } = wilsonInterval(correct, total);
    return LeaderboardEntry.fromPartial({
      rank: at + 1,
      participant,
      displayName: story.participants.get(participant) ?? "",
      submission: submission.name,
      correct,
      total,
      scoredSubmissions: counted.get(participant) ?? 0,
      intervalLow: low,
      intervalHigh: high,
    });
  });
  const final = task.state === TaskState.TASK_STATE_FINAL;
  return Leaderboard.fromPartial({ task: taskName, entries, round: task.rankingRound, final });
}

/** What a leaderboard that was shown says otherwise than the log, empty for nothing. */
export function difference(shown: Leaderboard, expected: Leaderboard): string {
  const { task, round, final, entries } = shown;
  if (task !== expected.task || round !== expected.round || final !== expected.final) {
    return `${task} is ranked by round ${round}, final: ${final}; the log says otherwise`;
  }
  if (entries.length !== expected.entries.length) {
    return `the leaderboard of ${task} has ${entries.length} places, the scores give ${expected.entries.length}`;
  }
  for (const [at, mine] of entries.entries()) {
    const other = expected.entries[at]!;
    if (isSame(mine, other)) continue;
    return `place ${other.rank} of ${task} shows ${told(mine)}, the scores give ${told(other)}`;
  }
  return "";
}

function isSame(one: LeaderboardEntry, other: LeaderboardEntry): boolean {
  const exact = ["rank", "participant", "displayName", "submission", "correct", "total", "scoredSubmissions"] as const;
  const near = ["intervalLow", "intervalHigh"] as const;
  return (
    exact.every((name) => one[name] === other[name]) &&
    near.every((name) => Math.abs(one[name] - other[name]) <= INTERVAL_ERROR)
  );
}

function told({ participant, submission, correct, total }: LeaderboardEntry): string {
  return `${participant} with ${submission}, ${correct}/${total}`;
}
