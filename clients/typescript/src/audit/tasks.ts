/** Tasks from their creation to their end, step by step. */

import { equal } from "../bytes.js";
import type { HoldoutChanged, TaskChanged, TaskCreated } from "../proto/tiltyard/type/v1/log.js";
import { Role } from "../proto/tiltyard/type/v1/participation.js";
import { TaskConfig, TaskSchedule, TaskState } from "../proto/tiltyard/type/v1/task.js";
import { rankingRound } from "./judging.js";
import { checkField, demandEligible } from "./memberships.js";
import { momentNs } from "./moments.js";
import { demandName } from "./names.js";
import type { Reading } from "./reading.js";
import { Task } from "./story.js";
import { demand } from "./wrong.js";

const STEPS = new Map<TaskState, readonly TaskState[]>([
  [TaskState.TASK_STATE_PREPARING, [TaskState.TASK_STATE_OPEN, TaskState.TASK_STATE_CANCELLED]],
  [TaskState.TASK_STATE_OPEN, [TaskState.TASK_STATE_CLOSED, TaskState.TASK_STATE_CANCELLED]],
  [TaskState.TASK_STATE_CLOSED, [TaskState.TASK_STATE_FINAL, TaskState.TASK_STATE_CANCELLED]],
]);

/** A task is created, by somebody who may. */
export function taskCreated({ story }: Reading, { task, creator, config = TaskConfig.create() }: TaskCreated): void {
  demand(!story.tasks.has(task), "history", `${task} is created twice`);
  demandEligible(story, task, creator, Role.ROLE_TASK_CREATOR);
  checkField(story, task, creator, config.field);
  story.tasks.set(task, new Task(task, creator, config));
  if (config.baseModel) demandName(config.baseModel, "artifact", "history");
}

/** A task goes on to its next state, or is amended. */
export function taskChanged(reading: Reading, { task: name, state, config, reason }: TaskChanged): void {
  const task = reading.task(name);
  if (config) {
    demand(state === task.state, "history", `${name} is amended and changes its state at once`);
    checkAmendment(task, config);
    task.config = config;
    return;
  }
  demand(STEPS.get(task.state)?.includes(state) ?? false, "history", `${name} makes a step that there is not`);
  if (state === TaskState.TASK_STATE_FINAL) {
    task.rankingRound = rankingRound(reading.story, task);
    const expected = `round ${task.rankingRound} ranks`;
    demand(reason === expected, "scores", `${name} is final by '${reason}', not '${expected}'`);
  }
  task.state = state;
  reading.checked.history += 1;
}

/** The holdout of a closed task is accepted, or not. */
export function holdoutChanged(reading: Reading, leaf: Uint8Array, { task: name, accepted, reason }: HoldoutChanged): void {
  const task = reading.task(name);
  demand(task.config.holdout !== undefined, "history", `${name} has no holdout`);
  demand(!task.isHoldoutTold, "history", `the holdout of ${name} has two fates`);
  const isClosed = task.state === TaskState.TASK_STATE_CLOSED;
  demand(isClosed, "history", `the holdout of ${name} is told of, and the task is not closed`);
  demand(accepted !== (reason !== ""), "history", `the holdout of ${name} has no clear fate`);
  task.isHoldoutTold = true;
  if (accepted) task.holdoutLeaf = leaf;
}

function checkAmendment(task: Task, config: TaskConfig): void {
  const closeNs = ({ schedule }: TaskConfig) => momentNs(schedule?.closeTime, "history", `the close of ${task.name}`);
  const isLater = closeNs(config) >= closeNs(task.config);
  // What a later version says of a task, unknown here, is part of what does not change.
  const fixed = (each: TaskConfig) => {
    const schedule = { ...(each.schedule ?? TaskSchedule.create()), closeTime: undefined };
    return TaskConfig.encode({ ...each, displayName: "", description: "", schedule }).finish();
  };
  const isSame = equal(fixed(task.config), fixed(config));
  demand(isSame && isLater, "history", `${task.name} is amended in what does not change`);
}
