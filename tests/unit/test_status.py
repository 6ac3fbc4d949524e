"""docs/status.md names exactly the methods of the contract that answer UNIMPLEMENTED."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor

import services
from tiltyard.inference.v2 import inference_pb2
from tiltyard.registry.v1 import (
    artifact_pb2,
    assignment_pb2,
    evaluation_pb2,
    leaderboard_pb2,
    log_pb2,
    membership_pb2,
    participant_pb2,
    submission_pb2,
    task_pb2,
)
from tiltyard.selector.v1 import draw_pb2, pool_pb2, stake_pb2
from tiltyard.trainer.v1 import trainer_pb2
from tiltyard.validator.v1 import validator_pb2

CONTRACT = (
    participant_pb2,
    task_pb2,
    membership_pb2,
    submission_pb2,
    assignment_pb2,
    evaluation_pb2,
    leaderboard_pb2,
    artifact_pb2,
    log_pb2,
    stake_pb2,
    pool_pb2,
    draw_pb2,
    trainer_pb2,
    validator_pb2,
    inference_pb2,
)
STATUS = Path(__file__).parents[2] / "docs" / "status.md"


def contract_services() -> Iterator[ServiceDescriptor]:
    for module in CONTRACT:
        yield from module.DESCRIPTOR.services_by_name.values()


def servicers(service: str) -> Iterator[type]:
    """Every class in services/ that extends the generated base of `service`."""
    for module in pkgutil.walk_packages(services.__path__, "services."):
        if "servicer" not in module.name:
            continue
        for _, value in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            bases = {base.__name__ for base in value.__mro__[1:]}
            if f"{service}Servicer" in bases:
                yield value


def unimplemented() -> set[str]:
    missing = set()
    for service in contract_services():
        classes = list(servicers(service.name))
        for method in service.methods:
            built = any(
                method.name in vars(base)
                for value in classes
                for base in value.__mro__
                if not base.__module__.endswith("_pb2_grpc")
            )
            if not built:
                missing.add(f"{service.full_name}/{method.name}")
    return missing


def test_status_lists_what_is_not_built() -> None:
    listed = set(re.findall(r"^\| `([\w.]+/\w+)` \|", STATUS.read_text(), flags=re.MULTILINE))

    assert listed == unimplemented()


def test_every_service_of_the_contract_has_a_servicer() -> None:
    assert [service.full_name for service in contract_services() if not list(servicers(service.name))] == []
