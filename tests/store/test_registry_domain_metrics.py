"""What the registry counts for telemetry in its database."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest

from services.registry.domain_metrics import FAULTS, DomainMetrics
from services.registry.records import ValidatorFault
from services.registry.states import ValidatorFaultKind
from tests.store.test_registry_store import START, Opened
from tiltyard.telemetry import metrics


@pytest.fixture
async def opened(database_url: str) -> AsyncIterator[Opened]:
    opened = Opened(database_url)
    yield opened
    await opened.database.close()


@pytest.fixture(autouse=True)
def _collecting() -> Iterator[None]:
    metrics.collect(True)
    yield
    metrics.collect(False)


async def test_each_fault_of_a_validator_is_counted_once(opened: Opened) -> None:
    def told() -> Mapping[Any, float]:
        return {dict(key)["kind"]: number for key, number in FAULTS.sums().items()}

    async def found(*kinds: ValidatorFaultKind) -> None:
        for kind in kinds:
            fault = ValidatorFault("t", 1, 1, "a" * 40, kind, START)
            await opened.store.write(lambda tx, fault=fault: tx.put_validator_fault(fault, costs_stake=False))

    # Those from before this process are in what an earlier one has told.
    await found(ValidatorFaultKind.OUTLIER, ValidatorFaultKind.OFFER_EXPIRED)
    counted = DomainMetrics(opened.database)
    before = told()
    assert before.keys() == {kind.name for kind in ValidatorFaultKind}
    await counted.count()
    assert told() == before
    await found(ValidatorFaultKind.OFFER_EXPIRED, ValidatorFaultKind.OFFER_EXPIRED, ValidatorFaultKind.LEASE_EXPIRED)
    for _ in range(2):
        await counted.count()
        more = {kind: number - before[kind] for kind, number in told().items()}
        assert more == {"OFFER_EXPIRED": 2, "LEASE_EXPIRED": 1, "SEAL_UNOPENED": 0, "OUTLIER": 0}
