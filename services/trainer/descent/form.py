"""Whether a checkpoint has the form of those that this version writes: another version may keep other things."""

from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from services.trainer.descent.checkpoints import Checkpoint, CheckpointUnreadable
from services.trainer.descent.holdout import Holdout

BEST, MODEL = "best.", "model."
# A run may go on on a device of another kind.
CUDA_RANDOM = "random.cuda"
_FACTS = frozenset({"step", "pieces", "stale_epochs", "best_rank", "holdout"})
# Checkpoints of earlier versions have none.
_OPTIONAL_FACTS = frozenset({"pieces"})
_HOLDOUT = frozenset(field.name for field in fields(Holdout))


def check_form(found: Checkpoint, tensors: Mapping[str, Tensor], *, total_steps: int) -> None:
    """Raises CheckpointUnreadable where a checkpoint lacks what it should have, has it in another shape, or has more.

    `tensors` are those of a descent that has made a step, but for the best weights of an epoch.
    """
    different = (set(found.facts) ^ _FACTS) - (_OPTIONAL_FACTS - set(found.facts))
    if different:
        raise _of_another_form(f"the fact {min(different)!r}")
    step, holdout, best = (found.facts[name] for name in ("step", "holdout", "best_rank"))
    if not isinstance(step, int) or not 0 <= step <= total_steps:
        raise _of_another_form(f"step {step} of {total_steps}")
    if holdout is not None and set(holdout) != _HOLDOUT:
        raise _of_another_form("the fact 'holdout'")
    wanted = {name: _form(tensor) for name, tensor in tensors.items()}
    if best is not None:
        wanted |= {name.replace(MODEL, BEST, 1): form for name, form in wanted.items() if name.startswith(MODEL)}
    kept = {name: _form(tensor) for name, tensor in found.tensors.items() if name != CUDA_RANDOM}
    for name in sorted(wanted.keys() | kept.keys()):
        if wanted.get(name) != kept.get(name):
            raise _of_another_form(f"the tensor {name!r}")


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape


def _of_another_form(what: str) -> CheckpointUnreadable:
    return CheckpointUnreadable(f"the checkpoint is of another form, as another version may leave one: {what}")
