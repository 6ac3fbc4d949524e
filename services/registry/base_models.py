"""The models that training starts from: there, for the creator to read, and exactly of the task's architecture."""

from collections.abc import Callable
from contextlib import closing
from datetime import datetime

from services.registry.artifacts.files import ArtifactFiles, StoredFile
from services.registry.artifacts.opening import open_recorded
from services.registry.artifacts.rights import readable
from services.registry.artifacts.storedwork import stored
from services.registry.records import Artifact
from services.registry.task_config import TaskConfig
from services.registry.transaction import Reading, Store
from services.runtime.errors import InvalidArgument, NotFound, PermissionDenied
from tiltyard.modelfile import check_model_file
from tiltyard.modelspec import ModelFault

_FIELD = "config.base_model"


class BaseModels:
    """Reads the header of a base model before a task may name it."""

    def __init__(self, store: Store, files: ArtifactFiles, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._files = files
        self._clock = clock

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
