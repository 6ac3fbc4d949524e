"""What a run says of itself, and the ways in which it ends."""

from dataclasses import dataclass
from enum import StrEnum

from services.trainer.datareport import DataReport


@dataclass(frozen=True)
class Trained:
    """The model is in the run's folder and has passed its self-check; `model_digest` is SHA-256 of its file."""

    model_digest: bytes


@dataclass(frozen=True)
class Broken:
    """The training cannot go on, for a reason that another attempt would meet again."""

    error: str


@dataclass(frozen=True)
class Died:
    """The process ended without a word, as when it is killed; it may go on from its last checkpoint."""

    detail: str


End = Trained | Broken | Died


@dataclass(frozen=True)
class Warned:
    """The training goes on in spite of something."""

    text: str


class Stage(StrEnum):
    """What is done with a dataset before the first step."""

    PACKING = "packing"
    EXAMINING = "examining"


@dataclass(frozen=True)
class Preparation:
    """How far a run is with its dataset before the first step; `total_rows` is 0 while they are not known."""

    stage: Stage
    rows: int
    total_rows: int


Note = Warned | DataReport | Preparation
