"""What happens to submissions, told as it happens: draws, seals, openings, scores."""

import asyncio
from collections.abc import Callable

from tiltyard.cli.demo.reporting import Reporter
from tiltyard.cli.submissions import describe
from tiltyard.client import PATIENCE_S, Client, pages, persist, watch
from tiltyard.registry.v1 import assignment_pb2, submission_pb2, task_pb2
from tiltyard.selector.v1 import draw_pb2
from tiltyard.type.v1 import draw_pb2 as draw_type_pb2
from tiltyard.type.v1 import evaluation_pb2
from tiltyard.type.v1 import task_pb2 as task_type_pb2

# Nothing waits for what is shown: the end of the task is watched, not polled.
_LOOK_EVERY_S = 0.5
_STATES = {
    evaluation_pb2.ASSIGNMENT_STATE_ACCEPTED: "evaluates",
    evaluation_pb2.ASSIGNMENT_STATE_SEALED: "sealed its report on",
    evaluation_pb2.ASSIGNMENT_STATE_OPENED: "opened its report on",
    evaluation_pb2.ASSIGNMENT_STATE_DECLINED: "declined",
    evaluation_pb2.ASSIGNMENT_STATE_EXPIRED: "was late with",
    evaluation_pb2.ASSIGNMENT_STATE_RELEASED: "was released from",
}


class Judging:
    """Tells what validators do with the submissions of `task`; `name_of` turns a participants/{id} into a name."""

    def __init__(self, task: str, client: Client, reporter: Reporter, name_of: Callable[[str], str]) -> None:
        self._task = task
        self._client = client
        self._reporter = reporter
        self._name_of = name_of
        self._told: set[tuple[str, int]] = set()
        self._ended: set[str] = set()

    async def until_final(self) -> None:
        """Waits until every submission has ended, and tells what is left to tell."""
        tasks = self._client.tasks
        ended = (task_type_pb2.TASK_STATE_FINAL, task_type_pb2.TASK_STATE_CANCELLED)
        async for seen in watch(tasks.WatchTask, task_pb2.WatchTaskRequest(name=self._task)):
            if seen.task.state in ended:
                break
        await self._look()

    async def follow(self) -> None:
        """Tells what changes until it is cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self) -> None:
        listing = submission_pb2.ListSubmissionsRequest(parent=self._task, page_size=1000)
        async for page in pages(self._client.submissions.ListSubmissions, listing, patience_s=PATIENCE_S):
            for submission in page.submissions:
                if submission.name not in self._ended and submission.draws:
                    await self._tell(submission)

    async def _tell(self, submission: submission_pb2.Submission) -> None:
        for draw in submission.draws:
            if self._is_new(draw, 0):
                receipt = await self._receipt(draw_pb2.GetDrawRequest(name=draw))
                picks = ", ".join(self._name_of(pick.participant) for pick in receipt.picks)
                self._reporter.say(f"drawn for {submission.name}: {picks} (seed {receipt.seed.hex()[:16]}...)")
        listing = assignment_pb2.ListAssignmentsRequest(parent=submission.name, page_size=1000)
        async for page in pages(self._client.assignments.ListAssignments, listing, patience_s=PATIENCE_S):
            for each in page.assignments:
                if each.state in _STATES and self._is_new(each.name, each.state):
                    self._reporter.say(f"{self._name_of(each.validator)} {_STATES[each.state]} {submission.name}")
        ended = (evaluation_pb2.SUBMISSION_STATE_SCORED, evaluation_pb2.SUBMISSION_STATE_REJECTED)
        if submission.state in ended:
            self._ended.add(submission.name)
            self._reporter.say(describe(submission))

    async def _receipt(self, request: draw_pb2.GetDrawRequest) -> draw_type_pb2.DrawReceipt:
        return (await persist(lambda: self._client.draws.GetDraw(request))).receipt

    def _is_new(self, name: str, state: int) -> bool:
        if (name, state) in self._told:
            return False
        self._told.add((name, state))
        return True
