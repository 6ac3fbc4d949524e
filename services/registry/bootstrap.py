"""Wires the registry once: from settings to servicers that are ready to be mounted, and the referee beside them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from services.registry import servicers
from services.registry.artifacts.artifacts import Artifacts
from services.registry.artifacts.files import ArtifactFiles
from services.registry.artifacts.garbage import Garbage
from services.registry.artifacts.storage import open_artifacts
from services.registry.artifacts.uploads import Uploads
from services.registry.assignments import Assignments
from services.registry.base_models import BaseModels
from services.registry.changes import ChangeBoard
from services.registry.evaluations import Evaluations
from services.registry.faults import ValidatorFaults
from services.registry.leaderboard import Leaderboard
from services.registry.memberships import Memberships
from services.registry.participants import Participants
from services.registry.peers import SelectorPeer
from services.registry.record_log import RecordLog
from services.registry.referee.draws import Draws
from services.registry.referee.judging import Judging
from services.registry.referee.outages import Outages
from services.registry.referee.referee import Referee, Step
from services.registry.referee.scans import DatasetScans
from services.registry.referee.structure import StructureChecks
from services.registry.referee.task_turns import TaskTurns
from services.registry.selection import Selection
from services.registry.servicers.artifacts import ArtifactServicer
from services.registry.servicers.assignments import AssignmentServicer
from services.registry.servicers.evaluations import EvaluationServicer
from services.registry.servicers.leaderboard import LeaderboardServicer
from services.registry.servicers.log import LogServicer
from services.registry.servicers.memberships import MembershipServicer
from services.registry.servicers.participants import ParticipantServicer
from services.registry.servicers.submissions import SubmissionServicer
from services.registry.servicers.tasks import TaskServicer
from services.registry.settings import RegistrySettings
from services.registry.store import SqlStore
from services.registry.submissions import Submissions
from services.registry.tasks import Tasks
from services.registry.transaction import Store
from services.runtime.auth import AccessPolicy, Authenticator, utc_now
from services.runtime.channels import open_peer
from services.runtime.daily import Daily
from services.runtime.database import Database
from services.runtime.errors import Unavailable
from services.runtime.paging import PageTokens, load_secret
from services.runtime.server import Mount
from tiltyard.identity import Key

_RETRY_SELECTOR_S = 0.5

_log = structlog.get_logger("tiltyard.registry")


@dataclass(frozen=True)
class Registry:
    """A registry that can be served: in a process of its own, or in one with others."""

    mounts: tuple[Mount, ...]
    authenticator: Authenticator
    policy: AccessPolicy
    database: Database
    store: Store
    referee: Referee
    garbage: Garbage
    files: ArtifactFiles
    uploads: Uploads
    outages: Outages
    log: RecordLog
    log_key: bytes
    """Raw Ed25519 public key that signs checkpoints, 32 bytes."""
    operators: frozenset[str]
    closing: tuple[Callable[[], Awaitable[None]], ...]

    async def begin(self) -> None:
        """Write the log's first leaf at the first start; until the selector has answered there is no arena.

        At a later start, move the deadlines that ran while the registry was away.
        """
        while True:
            try:
                await self.log.begin(operators=self.operators)
                await self.outages.end()
                return
            except Unavailable as error:
                _log.warning("waiting for the selector before the first start", error=str(error))
            await asyncio.sleep(_RETRY_SELECTOR_S)

    async def close(self) -> None:
        """Commits what is queued, and hangs up."""
        for close in self.closing:
            await close()


async def build(
    settings: RegistrySettings, *, clock: Callable[[], datetime] = utc_now, selection: Selection | None = None
) -> Registry:
    """Opens the state and puts everything together. Without a `selection` the selector of the settings is asked.

    `clock` is the record's; tokens go by the machine's, as their issuers' do.
    """
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_key = Key.load_or_create(settings.state_dir / "log.pem", settings.key_lock)
    tokens = PageTokens(load_secret(settings.state_dir / "pages.key"))
    files = await asyncio.to_thread(
        open_artifacts,
        settings.artifacts,
        state_dir=settings.state_dir,
        keep_free_bytes=settings.keep_free_bytes,
    )
    database = await asyncio.to_thread(
        Database.open, settings.database_url, migrations="services.registry.migrations", clock=clock
    )
    closing: list[Callable[[], Awaitable[None]]] = [database.close]
    if selection is None:
        key = Key.load_or_create(settings.key_file, settings.key_lock)
        channel = open_peer(
            settings.selector, key=key, audience=f"{settings.origin}/selector", tls=settings.channel_tls
        )
        selection = SelectorPeer(channel)
        closing.append(lambda: channel.close(None))
    changes = ChangeBoard()
    store = SqlStore(database, changes, clock)
    trusted, origin = settings.trusted, settings.origin

    log = RecordLog(store, selection, clock, origin=origin, key=log_key)
    daily = Daily(settings.daily_limits, settings.calls_unlimited)
    memberships = Memberships(store, selection, clock, daily, trusted=trusted)
    submissions = Submissions(store, clock, origin=origin)
    turns = TaskTurns(store, selection, log, DatasetScans(files, changes.wake_referee), clock)
    structure = StructureChecks(store, files, clock)
    draws = Draws(store, selection, clock)
    judging = Judging(store, clock)
    faults = ValidatorFaults(store, selection)
    outages = Outages(store, clock)
    uploads = Uploads(store, files, settings.quotas)
    base_models = BaseModels(store, files, selection, clock, trusted=trusted)
    steps: Sequence[Step] = (
        memberships.finish_joining,
        turns.scan_evaluation_datasets,
        turns.open_tasks,
        turns.mind_deadlines,
        submissions.expire_reveals,
        structure.check,
        turns.scan_holdouts,
        draws.start_rounds_of_holdout,
        draws.draw,
        judging.expire_assignments,
        judging.open_reports,
        judging.conclude,
        draws.call_reserves,
        draws.find_unheard,
        draws.settle,
        faults.slash,
        turns.disclose,
        turns.rank,
        memberships.remove_those_who_left,
        turns.close_pools,
    )
    mounts = servicers.mounts(
        participants=ParticipantServicer(
            Participants(store, selection, daily, trusted=trusted), origin=origin, tokens=tokens
        ),
        tasks=TaskServicer(
            Tasks(store, selection, changes, base_models, daily, trusted=trusted),
            clock,
            max_dataset_bytes=settings.max_artifact_bytes,
            tokens=tokens,
        ),
        memberships=MembershipServicer(memberships, origin=origin, tokens=tokens),
        submissions=SubmissionServicer(submissions, origin=origin, tokens=tokens),
        assignments=AssignmentServicer(Assignments(store, changes), tokens=tokens),
        evaluations=EvaluationServicer(Evaluations(store), faults, origin=origin, tokens=tokens),
        leaderboard=LeaderboardServicer(Leaderboard(store, changes)),
        artifacts=ArtifactServicer(
            Artifacts(store, files, uploads, base_models, clock), max_bytes=settings.max_artifact_bytes
        ),
        log=LogServicer(log),
    )
    return Registry(
        mounts=mounts,
        authenticator=Authenticator({f"{origin}/registry"}, settings.operators, settings.services),
        policy=AccessPolicy(),
        database=database,
        store=store,
        referee=Referee(outages.beat, steps, log.take_ledger_events, store, changes, clock),
        garbage=Garbage(store, files, uploads, clock, settings.keeping),
        files=files,
        uploads=uploads,
        outages=outages,
        log=log,
        log_key=log_key.public_bytes,
        operators=settings.operators,
        closing=tuple(closing),
    )
