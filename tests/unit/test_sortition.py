"""Draws: vectors, an independent reading of the text, distribution, proofs."""

import hashlib
import json
from collections import Counter
from itertools import accumulate, islice, permutations
from pathlib import Path
from typing import Any

import pytest

from tiltyard import bls
from tiltyard.commitments import draw_seed
from tiltyard.odds import inclusion_probabilities, odds
from tiltyard.sortition import (
    SQUARE_ROOT,
    Curve,
    CurveKind,
    Place,
    ProvedPlace,
    SumTree,
    check_order,
    draw,
    drawn_member,
    drawn_value,
    quota_limit,
    weight,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "draws.json").read_text())
MINIMUM = 1_000_000
LOG = Curve(CurveKind.LOG)
LOGISTIC = Curve(CurveKind.LOGISTIC)


def _tree(case: dict[str, Any]) -> SumTree:
    return SumTree((identifier, int(weight)) for identifier, weight in case["leaves"])


def _seed(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(4, "big")).digest()


# Vectors


def test_the_seed_follows_from_anchor_and_salt() -> None:
    made = VECTORS["seed"]
    key = bls.BlsKey(bytes.fromhex(made["bls_key_seed"]))
    sigma = key.sign(bytes.fromhex(made["anchor"]))
    assert (key.public_key.hex(), sigma.hex()) == (made["public_key"], made["sigma"])
    assert draw_seed(sigma=sigma, reveal_salt=bytes.fromhex(made["reveal_salt"])).hex() == made["seed"]


@pytest.mark.parametrize("case", VECTORS["values"])
def test_values_of_the_vectors(case: dict[str, Any]) -> None:
    value = drawn_value(bytes.fromhex(case["seed"]), case["place"], int(case["bound"]))
    assert value == int(case["value"]) < int(case["bound"])


@pytest.mark.parametrize("case", VECTORS["members"])
def test_members_of_the_vectors(case: dict[str, Any]) -> None:
    assert drawn_member(bytes.fromhex(case["seed"]), case["place"], case["members"]) == case["member"]


@pytest.mark.parametrize("case", VECTORS["weights"])
def test_weights_of_the_vectors(case: dict[str, Any]) -> None:
    curve = Curve(CurveKind(case["curve"]), case["alpha_millis"])
    stake, minimum = int(case["stake_micros"]), int(case["minimum_micros"])
    assert weight(stake, minimum_micros=minimum, curve=curve) == int(case["weight"])


@pytest.mark.parametrize("case", VECTORS["quotas"])
def test_quotas_of_the_vectors(case: dict[str, Any]) -> None:
    own, reference = int(case["weight"]), int(case["reference_weight"])
    assert quota_limit(own, reference_weight=reference, limit=case["limit"]) == case["uses"]


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: case["name"])
def test_orders_roots_and_paths_of_the_vectors(case: dict[str, Any]) -> None:
    tree = _tree(case)
    assert (tree.root().hex(), str(tree.total)) == (case["root"], case["total"])
    order = list(islice(draw(bytes.fromhex(case["seed"]), tree), len(case["order"])))
    assert [
        {"place": p.place, "leaf_index": p.leaf_index, "weight": str(p.weight), "value": str(p.value)} for p in order
    ] == case["order"]
    for place, expected in zip(order, case["paths"], strict=False):
        assert tree.path(place.leaf_index).hex() == expected


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda case: case["name"])
def test_the_text_of_the_algorithm_gives_the_vectors(case: dict[str, Any]) -> None:
    """docs/sortition.md written down plainly: a list, no tree."""
    seed = bytes.fromhex(case["seed"])
    left = [(index, int(weight)) for index, (_, weight) in enumerate(case["leaves"])]
    order = []
    while total := sum(weight for _, weight in left):
        place, attempt = len(order), 0
        bits = (total - 1).bit_length()
        while True:
            block = seed + b"\x00" + place.to_bytes(4, "big") + attempt.to_bytes(4, "big")
            value = int(hashlib.sha256(block).hexdigest(), 16) >> (256 - bits)
            if value < total:
                break
            attempt += 1
        running = list(accumulate(weight for _, weight in left))
        drawn = next(number for number, upto in enumerate(running) if value < upto)
        order.append(left.pop(drawn)[0])
    assert order == [place["leaf_index"] for place in case["order"]]


# Order


def test_a_draw_goes_on_where_it_stopped() -> None:
    tree = SumTree((str(number), 1 + number) for number in range(50))
    whole = list(draw(_seed(1), tree))
    for stop in (0, 1, 7, 49, 50):
        assert list(draw(_seed(1), tree, [place.leaf_index for place in whole[:stop]])) == whole[stop:]
    assert sorted(place.leaf_index for place in whole) == list(range(50))


def test_a_draw_leaves_the_tree_as_it_was() -> None:
    tree = SumTree((str(number), 1 + number) for number in range(20))
    root = tree.root()
    whole = list(draw(_seed(2), tree))
    assert (tree.root(), tree.total) == (root, 210)
    assert list(draw(_seed(2), tree)) == whole


def test_a_pool_without_weight_gives_nobody() -> None:
    assert list(draw(_seed(1), SumTree())) == []
    assert list(draw(_seed(1), SumTree([("a", 0), ("b", 0)]))) == []


def test_a_seed_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        next(draw(b"short", SumTree([("a", 1)])))


RUNS = 100_000
PICKS = 3


@pytest.fixture(scope="module", params=[(1, 2, 3, 5, 9, 14), (1, 1, 1, 1, 1, 1), (1, 1000, 1, 30, 7, 7)])
def drawn(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], Counter[tuple[int, ...]]]:
    """Weights of six groups, and how often each order of three came up in 100,000 draws."""
    weights: tuple[int, ...] = request.param
    tree = SumTree((str(index), weight << 32) for index, weight in enumerate(weights))
    orders = (islice(draw(_seed(run), tree), PICKS) for run in range(RUNS))
    return weights, Counter(tuple(place.leaf_index for place in order) for order in orders)


def test_orders_fit_sequential_sampling_without_replacement(
    drawn: tuple[tuple[int, ...], Counter[tuple[int, ...]]],
) -> None:
    weights, seen = drawn
    statistic, expected_rarely, seen_rarely, cells = 0.0, 0.0, 0, 0
    for order in permutations(range(len(weights)), PICKS):
        left, chance = sum(weights), 1.0
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        if RUNS * chance < 5:  # too few for chi-square: counted together
            expected_rarely, seen_rarely = expected_rarely + RUNS * chance, seen_rarely + seen[order]
        else:
            statistic += (seen[order] - RUNS * chance) ** 2 / (RUNS * chance)
            cells += 1
    if expected_rarely:
        statistic += (seen_rarely - expected_rarely) ** 2 / expected_rarely
        cells += 1
    # Chi-square with this many degrees of freedom exceeds this with a chance of 0.001 (Wilson and Hilferty).
    freedom = cells - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_frequencies_fit_the_exact_inclusion_probabilities(
    drawn: tuple[tuple[int, ...], Counter[tuple[int, ...]]],
) -> None:
    weights, seen = drawn
    chances = inclusion_probabilities(weights, PICKS)
    assert sum(chances) == pytest.approx(PICKS)
    for index, chance in enumerate(chances):
        times = sum(number for order, number in seen.items() if index in order)
        statistic = (times - RUNS * chance) ** 2 / (RUNS * chance * (1 - chance))
        # One degree of freedom; 0.001 for all six together.
        assert statistic < 14.1


def test_members_of_one_group_never_appear_together_and_share_its_chance_evenly() -> None:
    """Groups of one, two and three members: their number changes who of them is picked, never how often one is."""
    members = [[f"{group}.{number}" for number in range(1 + group % 3)] for group in range(6)]
    tree = SumTree((str(group), (1 + group) << 32) for group in range(6))
    runs = 30_000
    seen: Counter[str] = Counter()
    for run in range(runs):
        seed = _seed(run)
        picked = [
            drawn_member(seed, place.place, members[place.leaf_index]) for place in islice(draw(seed, tree), PICKS)
        ]
        assert len({member.partition(".")[0] for member in picked}) == PICKS
        seen.update(picked)
    for group, chance in enumerate(inclusion_probabilities([1, 2, 3, 4, 5, 6], PICKS)):
        for member in members[group]:
            each = chance / len(members[group])
            assert (seen[member] - runs * each) ** 2 / (runs * each * (1 - each)) < 16


def test_members_are_drawn_uniformly() -> None:
    members = ["a", "b", "c", "d", "e"]
    runs = 20_000
    seen = Counter(drawn_member(_seed(run), run % 7, members) for run in range(runs))
    statistic = sum((seen[member] - runs / 5) ** 2 / (runs / 5) for member in members)
    # Four degrees of freedom, 0.001.
    assert statistic < 18.47


# Receipts


def _proved(tree: SumTree, seed: bytes, places: int) -> list[ProvedPlace]:
    return [
        ProvedPlace(place, tree.identifier(place.leaf_index), tree.path(place.leaf_index))
        for place in islice(draw(seed, tree), places)
    ]


def test_an_order_is_proved_by_its_paths_and_no_change_gets_through() -> None:
    tree = SumTree((f"group {number}", 3 + number) for number in range(21))
    proved = _proved(tree, _seed(5), 4)
    arguments = {"root": tree.root(), "leaf_count": len(tree), "total": tree.total}
    check_order(_seed(5), proved, **arguments)
    with pytest.raises(ValueError, match="does not follow from the seed"):
        check_order(_seed(6), proved, **arguments)
    for name, wrong in (("root", bytes(32)), ("leaf_count", 22), ("total", tree.total + 1)):
        with pytest.raises(ValueError, match="place 0"):
            check_order(_seed(5), proved, **(arguments | {name: wrong}))
    first, *others = proved
    place = first.place
    for changed in (
        ProvedPlace(Place(0, place.leaf_index, place.weight + 1, place.value), first.identifier, first.path),
        ProvedPlace(Place(0, place.leaf_index ^ 1, place.weight, place.value), first.identifier, first.path),
        ProvedPlace(Place(0, place.leaf_index, place.weight, place.value + 1), first.identifier, first.path),
        ProvedPlace(place, "somebody else", first.path),
        ProvedPlace(place, first.identifier, first.path[:-1]),
        ProvedPlace(place, first.identifier, first.path[48:] + first.path[:48]),
        ProvedPlace(place, others[0].identifier, others[0].path),
    ):
        with pytest.raises(ValueError, match="place 0"):
            check_order(_seed(5), [changed, *others], **arguments)
    with pytest.raises(ValueError, match="place 0 of the order is missing"):
        check_order(_seed(5), others, **arguments)


def test_the_proof_of_another_leaf_at_the_right_value_is_refused() -> None:
    tree = SumTree((f"group {number}", 7) for number in range(8))
    (proved,) = _proved(tree, _seed(5), 1)
    other = (proved.place.leaf_index + 1) % 8
    forged = ProvedPlace(Place(0, other, 7, proved.place.value), tree.identifier(other), tree.path(other))
    with pytest.raises(ValueError, match="falls on another leaf"):
        check_order(_seed(5), [forged], root=tree.root(), leaf_count=8, total=tree.total)


# Weights


@pytest.mark.parametrize(
    ("stake", "limit", "uses"),
    [(10, 100, 100), (40, 100, 100), (1, 100, 31), (2, 100, 44), (1, 1, 1), (0, 100, 1)],
)
def test_the_quota_grows_with_stake_up_to_the_limit(stake: int, limit: int, uses: int) -> None:
    own, reference = (weight(minimums * MINIMUM, minimum_micros=MINIMUM, curve=SQUARE_ROOT) for minimums in (stake, 10))
    assert quota_limit(own, reference_weight=reference, limit=limit) == uses


# Odds


def test_exact_and_simulated_odds_agree() -> None:
    weights = [1 + number for number in range(20)]
    tree = SumTree((str(index), value) for index, value in enumerate(weights))
    simulated = odds(tree, 12, 4)
    assert simulated.standard_error > 0
    runs = 4000
    hits = sum(
        any(place.leaf_index == 12 for place in islice(draw(_seed(10**6 + run), tree), 4)) for run in range(runs)
    )
    counted_error = (hits / runs * (1 - hits / runs) / runs) ** 0.5
    assert simulated.standard_error < counted_error
    assert abs(simulated.probability - hits / runs) < 4 * (counted_error + simulated.standard_error)
    assert sum(odds(tree, index, 4).probability for index in range(20)) == pytest.approx(4, abs=0.01)
    exact = inclusion_probabilities([1, 1, 2], 2)
    assert exact == pytest.approx([1 / 4 + 1 / 4 / 3 + 1 / 4, 1 / 4 + 1 / 4 / 3 + 1 / 4, 1 / 2 + 2 * 1 / 4 * 2 / 3])
    small = SumTree([("a", 5), ("b", 0), ("c", 3)])
    assert odds(small, 1, 2).probability == 0
    assert odds(small, 2, 2).probability == 1
    # A draw of more than there are is refused.
    assert odds(small, 2, 3).probability == 0
    assert odds(SumTree([("a", 1), ("b", 1), ("c", 2)]), 2, 2).probability == pytest.approx(exact[2])


def test_odds_of_many_places_are_told_as_well_by_fewer_draws() -> None:
    tree = SumTree((str(index), 1 + index) for index in range(200))
    told = [odds(tree, index, 99) for index in range(0, 200, 20)]
    assert all(0 < each.standard_error < each.probability / 150 for each in told)
    # More places than the simulation has, and all of one weight: no order says anything else than another.
    alike = SumTree((str(index), 1) for index in range(6000))
    assert odds(alike, 0, 5000).probability == pytest.approx(5000 / 6000)


@pytest.mark.parametrize("size", [6, 30])
@pytest.mark.parametrize("picks", [1, 3])
def test_odds_leave_out_who_is_always_passed_over(size: int, picks: int) -> None:
    """As though the leaf were not there, whose place in the order others get."""
    weights = [7 + number for number in range(size)]
    whole = SumTree((str(index), value) for index, value in enumerate(weights))
    without = SumTree((str(index), value if index != 2 else 0) for index, value in enumerate(weights))
    told, expected = odds(whole, 4, picks, left_out=[2]), odds(without, 4, picks)
    error = 4 * (told.standard_error + expected.standard_error)
    assert told.probability == pytest.approx(expected.probability, abs=error, rel=1e-12)
    assert told.probability > odds(whole, 4, picks).probability + error
    assert odds(whole, 2, picks, left_out=[2]).probability == 0


# Keys


def test_a_bls_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "bls.key"
    key = bls.BlsKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    assert bls.BlsKey.load_or_create(path).public_key == key.public_key
    path.write_text("not a key")
    with pytest.raises(ValueError, match="holds no BLS key seed"):
        bls.BlsKey.load_or_create(path)


def test_signatures_hold_for_one_key_and_one_message() -> None:
    key, other = bls.BlsKey(b"1" * 32), bls.BlsKey(b"2" * 32)
    signature = key.sign(b"message")
    assert key.sign(b"message") == signature
    assert bls.verify(key.public_key, b"message", signature)
    assert not bls.verify(key.public_key, b"another", signature)
    assert not bls.verify(other.public_key, b"message", signature)
    assert not bls.verify(key.public_key, b"message", signature[:-1])
    assert not bls.verify(key.public_key, b"message", bytes(bls.SIGNATURE_BYTES))
    infinity = bytes([0xC0]) + bytes(bls.PUBLIC_KEY_BYTES - 1)
    infinite_signature = bytes([0xC0]) + bytes(bls.SIGNATURE_BYTES - 1)
    assert not bls.verify(infinity, b"message", infinite_signature)
