"""What a training node tells of its trainings in numbers."""

from collections import Counter

from services.trainer.live import LiveTrainings
from services.trainer.training import TrainingState
from tiltyard.telemetry import metrics

DEATHS = metrics.Counter(
    "tiltyard.training.deaths",
    unit="{process}",
    description="Processes of trainings that ended without a word.",
    told_at_zero=[{}],
)
ENDED = metrics.Counter("tiltyard.trainings.ended", unit="{training}", description="Trainings that ended, by state.")

_TRAININGS = metrics.Gauge("tiltyard.trainings", unit="{training}", description="Trainings not yet ended, by state.")
_RATE = metrics.Gauge("tiltyard.training.rate", unit="{sample}/s", description="Rows trained on a second, in all.")

_UNENDED = (TrainingState.QUEUED, TrainingState.RUNNING, TrainingState.SUBMITTING)


def follow(live: LiveTrainings) -> None:
    """Tells how many trainings there are, and how fast they go, whenever metrics are collected."""

    def counts() -> dict[metrics.Key, float]:
        states = Counter(training.state for training in live.all())
        return {(("state", state.value),): states[state] for state in _UNENDED}

    def rate() -> dict[metrics.Key, float]:
        running = [training for training in live.all() if training.state is TrainingState.RUNNING]
        return {(): sum(training.progress.samples_per_second for training in running if training.progress)}

    _TRAININGS.follow(counts)
    _RATE.follow(rate)
