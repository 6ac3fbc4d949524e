"""The demo's end: the leaderboard, what of it can be verified, and the results for programs."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltyard.audit import Record, audit, write_record
from tiltyard.audit.download import fetch_record
from tiltyard.cli.demo.data import NamedModel
from tiltyard.cli.demo.reporting import Reporter
from tiltyard.cli.demo.stage import Cast
from tiltyard.cli.demo.verification import verify
from tiltyard.cli.output import as_json, enum_name
from tiltyard.cli.tasks import fetch_results
from tiltyard.client import PATIENCE_S, pages, persist
from tiltyard.receipts import receipt_to_json
from tiltyard.registry.v1 import leaderboard_pb2, submission_pb2
from tiltyard.type.v1 import evaluation_pb2

_LEDGER_EVERY_S = 0.5


@dataclass(frozen=True)
class Result:
    """What came out: the object of `--json`, and whether everything was scored and everything checked is right."""

    document: dict[str, Any]
    succeeded: bool


@dataclass(frozen=True)
class Ending:
    """What the end is told from."""

    task: str
    cast: Cast
    models: Sequence[NamedModel]
    reporter: Reporter
    state: Path

    async def tell(self, *, expected: int, export: Path | None) -> Result:
        """Shows the ranking, verifies it against the record log, and sums up; `expected` submissions must be scored."""
        reporter = self.reporter
        board, submissions = await self._outcome()
        reporter.say("leaderboard:")
        for entry in board.entries:
            reporter.say(
                f"  {entry.rank}. {entry.display_name:<12} {entry.correct}/{entry.total} "
                f"= {entry.correct / entry.total:.4f}  ({entry.interval_low:.4f} to {entry.interval_high:.4f})"
            )
        record = await self._record()
        checks = await asyncio.to_thread(verify, record, submissions, board)
        for check in checks:
            reporter.say(f"{'verified' if check.passed else 'NOT VERIFIED'}: {check.claim}")
            if not check.passed:
                reporter.say(f"  {check.detail}")
        unscored = [each for each in submissions if each.state != evaluation_pb2.SUBMISSION_STATE_SCORED]
        for each in unscored:
            reporter.say(f"{each.name} was not scored: {enum_name(each, 'reason')} {each.detail}")
        succeeded = len(submissions) == expected and not unscored and all(check.passed for check in checks)
        document = {
            "task": self.task,
            "seconds": round(reporter.seconds, 3),
            "submissions": [self._submission(each) for each in submissions],
            "leaderboard": [{**as_json(each), "correct": each.correct, "total": each.total} for each in board.entries],
            "verified": {check.claim: check.passed for check in checks},
            "state": str(self.state),
        }
        if export:
            await self._export(export, record, board, document)
        reporter.say(
            f"{'done' if succeeded else 'FAILED'} in {reporter.seconds:.1f} s; state, keys and logs lie in {self.state}"
        )
        return Result(document, succeeded)

    async def _record(self) -> Record:
        """The log, once the selector's last events are in it: the registry takes them over within a second."""
        client = self.cast.creator.client
        until = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            record = await fetch_record(client)
            pending = (await asyncio.to_thread(audit, record)).pending
            if not pending or asyncio.get_running_loop().time() >= until:
                return record
            await asyncio.sleep(_LEDGER_EVERY_S)

    async def _outcome(self) -> tuple[leaderboard_pb2.Leaderboard, list[submission_pb2.Submission]]:
        client = self.cast.creator.client
        request = leaderboard_pb2.GetLeaderboardRequest(task=self.task)
        board = (await persist(lambda: client.leaderboard.GetLeaderboard(request))).leaderboard
        listing = submission_pb2.ListSubmissionsRequest(parent=self.task, page_size=1000)
        listed = pages(client.submissions.ListSubmissions, listing, patience_s=PATIENCE_S)
        return board, [each async for page in listed for each in page.submissions]

    def _submission(self, each: submission_pb2.Submission) -> dict[str, Any]:
        is_scored = each.state == evaluation_pb2.SUBMISSION_STATE_SCORED
        document: dict[str, Any] = {
            "name": each.name,
            "participant": each.participant,
            "display_name": self.cast.name_of(each.participant),
            "model": self.models[each.model_index].name,
            "state": enum_name(each, "state"),
            "accuracy": each.score.correct / each.score.total if is_scored and each.score.total else None,
            "correct": each.score.correct if is_scored else None,
            "total": each.score.total if is_scored else None,
            "validators": list(each.validators),
        }
        if each.reason:
            document["reason"] = enum_name(each, "reason")
        return document

    async def _export(
        self, folder: Path, record: Record, board: leaderboard_pb2.Leaderboard, document: dict[str, Any]
    ) -> None:
        await asyncio.to_thread(_export_record, folder, record, board)
        models = await fetch_results(self.cast.creator.client, self.task, folder / "models")
        await asyncio.to_thread((folder / "demo.json").write_text, json.dumps(document, indent=2) + "\n")
        self.reporter.say(f"log, receipts of draws and {len(models)} models exported to {folder}")


def _export_record(folder: Path, record: Record, board: leaderboard_pb2.Leaderboard) -> None:
    receipts, keys, boards = folder / "receipts", folder / "keys", folder / "leaderboards"
    for each in (receipts, keys, boards):
        each.mkdir(parents=True, exist_ok=True)
    write_record(record, folder / "log")
    (boards / f"{board.task.removeprefix('tasks/')}.json").write_text(json.dumps(as_json(board), indent=2) + "\n")
    for receipt in record.draws():
        name = receipt.draw.removeprefix("draws/").replace("/", "-")
        (receipts / f"{name}.json").write_text(receipt_to_json(receipt))
    (keys / "selector.pub").write_text(record.genesis.selector_key.hex() + "\n")
