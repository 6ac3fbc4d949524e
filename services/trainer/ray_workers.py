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
from services.trainer.run import train
from services.trainer.runfolder import Say
from services.trainer.workers import ProcessGroup

_END = None
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
    # What a killed process left there is in the way of this one.
    scratch = runfolder.scratch(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
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
                else:
                    say(event)

        listener = threading.Thread(target=listen, name="events")
        listener.start()
        trainer = TorchTrainer(
            _work,
            train_loop_config={"folder": str(folder), "events": events},
            torch_config=TorchConfig(backend="nccl" if on_cuda else "gloo"),
            scaling_config=ScalingConfig(num_workers=order.config.workers, use_gpu=on_cuda),
            run_config=RunConfig(name="run", storage_path=str(scratch / "storage")),
        )
        try:
            trainer.fit()
        except Exception as error:
            # Ray's own errors have no common base; the run's checkpoint stands, and the queue tries again.
            say({"event": "warning", "text": f"ray: {type(error).__name__}: {' '.join(str(error).split())[-300:]}"})
        events.put(_END)
        listener.join()
        return statuses[-1] if statuses else 1
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    """One worker."""
    workers, events = ProcessGroup(), config["events"]
    say: Say = events.put if workers.rank == 0 else _say_nothing
    device = get_device()
    status = train(Path(config["folder"]), say=say, stopped=threading.Event(), workers=workers, device=str(device))
    if workers.rank == 0:
        events.put({"status": status})


def _say_nothing(_event: dict[str, Any]) -> None:
    """What the first worker says is enough."""
