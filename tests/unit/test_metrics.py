"""Counters, gauges and histograms, before anybody exports them."""

import threading
from collections.abc import Iterator

import pytest

from tiltyard.telemetry import metrics


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(metrics, "_declared", {})
    metrics.collect(True)
    yield
    metrics.collect(False)


@pytest.mark.usefixtures("fresh")
def test_counters_add_up_by_attributes() -> None:
    counter = metrics.Counter("c", unit="{x}", description="")
    counter.add(state="a")
    counter.add(2, state="a")
    counter.add(5, state="b")
    assert counter.sums() == {(("state", "a"),): 3, (("state", "b"),): 5}
    metrics.collect(False)
    counter.add(state="a")
    assert counter.sums()[("state", "a"),] == 3


@pytest.mark.usefixtures("fresh")
def test_a_counter_that_says_so_is_told_before_it_counts() -> None:
    plain = metrics.Counter("c", unit="{x}", description="", told_at_zero=[{}])
    by_state = metrics.Counter("d", unit="{x}", description="", told_at_zero=[{"state": "a"}, {"state": "b"}])
    assert plain.sums() == {(): 0}
    by_state.add(2, state="b")
    assert by_state.sums() == {(("state", "a"),): 0, (("state", "b"),): 2}


@pytest.mark.usefixtures("fresh")
def test_gauges_are_set_or_asked() -> None:
    gauge = metrics.Gauge("g", unit="{x}", description="")
    gauge.set(3, state="a")
    gauge.set(2, state="a")
    gauge.follow(lambda: {(("state", "a"),): 1, (("state", "b"),): 7})
    assert gauge.values() == {(("state", "a"),): 3, (("state", "b"),): 7}
    metrics.collect(False)
    gauge.follow(lambda: {(): 1})
    assert () not in gauge.values()


@pytest.mark.usefixtures("fresh")
def test_histograms_count_by_upper_bound() -> None:
    histogram = metrics.Histogram("h", unit="s", description="", bounds=(1, 2))
    for value in (0.5, 1, 1.5, 2, 9):
        histogram.record(value)
    (found,) = histogram.distributions().values()
    assert found.counts == [2, 2, 1]
    assert (found.count, found.total, found.lowest, found.highest) == (5, 14, 0.5, 9)


@pytest.mark.usefixtures("fresh")
def test_no_value_is_lost_between_those_who_record_and_those_who_collect() -> None:
    histogram = metrics.Histogram("h", unit="s", description="", bounds=(1, 2))

    def record() -> None:
        for number in range(20_000):
            histogram.record(number % 3 + 0.5)

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        for found in histogram.distributions().values():
            assert seen <= found.count == sum(found.counts)
            seen = found.count
    (found,) = histogram.distributions().values()
    assert found.count == 60_000
    assert found.counts == [20_001, 20_001, 19_998]
    assert (found.total, found.lowest, found.highest) == (89_997, 0.5, 2.5)


@pytest.mark.usefixtures("fresh")
def test_a_distribution_that_is_kept_tells_of_nothing_before_its_first_value() -> None:
    histogram = metrics.Histogram("h", unit="s", description="", bounds=(1,))
    kept = histogram.under((("state", "a"),))
    assert histogram.distributions() == {}
    kept.record(3)
    histogram.record(0.5, state="a")
    (found,) = histogram.distributions().values()
    assert found.counts == [1, 1]


@pytest.mark.usefixtures("fresh")
def test_further_combinations_of_attributes_are_counted_together() -> None:
    counter = metrics.Counter("c", unit="{x}", description="")
    histogram = metrics.Histogram("h", unit="s", description="", bounds=(1,))
    for number in range(metrics.MAX_SERIES + 10):
        counter.add(number=number)
        histogram.record(0, number=number)
    assert counter.sums()[metrics.OVERFLOW] == 10
    assert len(counter.sums()) == len(histogram.distributions()) == metrics.MAX_SERIES + 1
    assert histogram.distributions()[metrics.OVERFLOW].count == 10


@pytest.mark.usefixtures("fresh")
def test_a_name_is_declared_once() -> None:
    metrics.Counter("c", unit="{x}", description="")
    with pytest.raises(ValueError, match="declared twice"):
        metrics.Gauge("c", unit="{x}", description="")
