"""`executor = ray`: the same training function in n workers under Ray Train's TorchTrainer.

The workers share the run's folder. Where RAY_ADDRESS names a cluster they run there, else in one started for this run,
which ends with this process.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.queue import Queue

from services.trainer import runfolder
from services.trainer.descent.run import train
from services.trainer.descent.workers import ProcessGroup
from services.trainer.fulldisk import make_folder_with_room, write_when_there_is_room
from services.trainer.runfolder import Say

_END = None
# More than Ray writes before it trains. On a full disk it would wait for half a minute, and then not say what for.
_START_BYTES = 16 << 20
# A cluster for one run on one machine: nobody takes it away or asks for figures, and an end is noticed at once.
_ONE_MACHINE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}


def train_with_ray(folder: Path, say: Say) -> int:
    """Trains what the folder orders with `config.workers` workers; an exit status."""
    order = runfolder.read_order(folder)
    on_cuda = order.device != "cpu"
    # A cluster's workers may each have a machine; those of this run's own are all on this one.
    sharing = 1 if "RAY_ADDRESS" in os.environ else order.config.workers
    # What a killed process left there is in the way of this one. Told to stop while it waits, this process ends.
    scratch = runfolder.scratch(folder)
    write_when_there_is_room(
        lambda: make_folder_with_room(scratch, _START_BYTES),
        warn=lambda text: say({"event": "warning", "text": text}),
        wait=threading.Event().wait,
    )
    try:
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            for name, value in _ONE_MACHINE.items():
                os.environ.setdefault(name, value)
            ray.init(
                address="local",
                num_cpus=order.config.workers,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(scratch / "ray"),
            )
        events = Queue(actor_options={"num_cpus": 0})
        statuses: list[int] = []

        def listen() -> None:
            while (event := events.get()) is not _END:
                if "status" in event:
                    statuses.append(event["status"])
                elif not any(statuses):
                    # Of several workers that break, the first one's word counts.
                    say(event)

        listener = threading.Thread(target=listen, name="events")
        listener.start()
        failure = ""
        trainer = TorchTrainer(
            _work,
            train_loop_config={"folder": str(folder), "events": events, "sharing": sharing},
            torch_config=TorchConfig(backend="nccl" if on_cuda else "gloo"),
            scaling_config=ScalingConfig(num_workers=order.config.workers, use_gpu=on_cuda),
            run_config=RunConfig(name="run", storage_path=str(scratch / "storage")),
        )
        try:
            trainer.fit()
        except Exception as error:
            # Ray's own errors have no common base. A worker that broke has said why; else the run's checkpoint stands,
            # and the queue tries again.
            failure = f"ray: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        events.put(_END)
        listener.join()
        if failure and not any(statuses):
            say({"event": "warning", "text": failure})
        return max(statuses, default=1)
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


class _Broke(Exception):
    """A worker has ended before its time and said why: the others, who would wait for it, end with it."""


def _work(config: dict[str, Any]) -> None:
    """One worker. It ends by WorkerLost where another one died: then nothing has broken, and the queue tries again."""
    workers, events = ProcessGroup(), config["events"]

    def say(event: dict[str, Any]) -> None:
        # Of what goes well the first worker's word is enough.
        if workers.rank == 0 or event["event"] == "broken":
            events.put(event)

    status = train(
        Path(config["folder"]),
        say=say,
        stopped=threading.Event(),
        workers=workers,
        sharing=config["sharing"],
        device=str(get_device()),
    )
    if workers.rank == 0 or status:
        events.put({"status": status})
    if status:
        raise _Broke
