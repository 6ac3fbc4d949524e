"""The models that training starts from: there, for the creator to read, and exactly of the task's architecture."""

from collections.abc import Callable, Collection
from contextlib import closing
from datetime import datetime, timedelta

from services.registry.artifacts.files import ArtifactFiles, StoredFile
from services.registry.artifacts.opening import open_recorded
from services.registry.artifacts.rights import readable
from services.registry.artifacts.storedwork import stored
from services.registry.eligibility_facts import facts_of, not_eligible
from services.registry.participants import registered
from services.registry.records import Artifact
from services.registry.selection import EligibilityFacts, Selection
from services.registry.states import Curve, Role
from services.registry.task_config import SelectionPolicy, TaskConfig, ValidatorRate
from services.registry.transaction import Reading, Store
from services.runtime.errors import InvalidArgument, NotFound, PermissionDenied
from tiltyard.modelfile import check_model_file
from tiltyard.modelspec import ModelFault

_FIELD = "config.base_model"
# A base model is there before its task is, and for a creator neither the task nor its policy matters.
_ANY_TASK = "any"
_ANY_POLICY = SelectionPolicy(Curve.POWER, 0, 0, 0, ValidatorRate(timedelta(), 0, 0))


class BaseModels:
    """Lets those hand base models in who may create tasks, and reads the header before a task may name one.

    The endorsements of `trusted` participants count for eligibility.
    """

    def __init__(
        self,
        store: Store,
        files: ArtifactFiles,
        selection: Selection,
        clock: Callable[[], datetime],
        *,
        trusted: Collection[str],
    ) -> None:
        self._store = store
        self._files = files
        self._selection = selection
        self._clock = clock
        self._trusted = frozenset(trusted)

    async def check_creator(self, caller: str) -> None:
        """Whether the caller may hand a base model in, endorsed in whichever field. The verdict is not recorded.

        Raises FailedPrecondition(NOT_REGISTERED, NOT_ELIGIBLE).
        """

        def gather(tx: Reading) -> EligibilityFacts:
            registered(tx, caller)
            return facts_of(tx, caller, field=None, trusted=self._trusted)

        facts = await self._store.read(gather)
        answer = await self._selection.check_eligibility(
            participant=caller, task=_ANY_TASK, role=Role.TASK_CREATOR, facts=facts, policy=_ANY_POLICY
        )
        if not answer.verdict.eligible:
            raise not_eligible(answer.verdict)

    async def check(self, caller: str, config: TaskConfig) -> None:
        """Whether a task of the caller may be created so.

        Raises InvalidArgument for config.base_model, DataLoss(ARTIFACT_LOST), Unavailable(STORAGE_FAILED).
        """
        if not config.base_model:
            return
        now = self._clock()
        file = await open_recorded(
            self._store, self._files, lambda tx: demand_base_model(tx, caller, config.base_model, now)
        )
        fault = await stored(lambda: _examine(file, config))
        if fault is not None:
            raise InvalidArgument.field(
                _FIELD, f"is not of the task's model ({fault.code.value}): {fault.detail}", reason="BASE_MODEL_UNFIT"
            )


def demand_base_model(tx: Reading, caller: str, sha256: str, now: datetime) -> Artifact:
    """The artifact, which the caller may read. Raises InvalidArgument for config.base_model."""
    try:
        return readable(tx, caller, sha256, now)
    except (NotFound, PermissionDenied) as error:
        raise InvalidArgument.field(_FIELD, f"{error.message}: upload it first", reason=error.reason) from None


def _examine(opened: StoredFile, config: TaskConfig) -> ModelFault | None:
    with closing(opened) as file:
        try:
            check_model_file(
                file.read,
                file.size,
                config.models[0],
                max_bytes=config.limits.max_model_bytes,
                max_parameters=config.limits.max_parameters,
            )
        except ModelFault as fault:
            return fault
    return None
