"""Receipts: what is signed verifies, and no change of any value gets through, whoever makes it."""

import base64
import copy
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from tiltyard.bls import BlsKey
from tiltyard.cli.commands import app
from tiltyard.cli.draws import outcome_of
from tiltyard.commitments import draw_seed
from tiltyard.receipts import (
    NOT_PROVED,
    ReceiptInvalid,
    receipt_from_json,
    receipt_to_json,
    sign_receipts,
    verify_receipt,
)
from tiltyard.sortition import Place, SumTree, draw, draw_id, drawn_member
from tiltyard.type.v1 import draw_pb2, task_pb2

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "draws.json").read_text())
KEY = BlsKey(b"k" * 32)
GROUPS = 11
PASSED_OVER = {1: draw_pb2.PASSED_OVER_REASON_PAUSED, 3: draw_pb2.PASSED_OVER_REASON_QUOTA}


def _members(group: int) -> list[str]:
    return sorted(
        f"participants/{hashlib.sha256(f'{group}/{n}'.encode()).hexdigest()[:40]}" for n in range(1 + group % 3)
    )


def _group(group: int) -> str:
    return _members(group)[0].removeprefix("participants/")


def _sum(value: int) -> bytes:
    return value.to_bytes(16, "big")


def signed(receipt: draw_pb2.DrawReceipt, key: BlsKey = KEY) -> draw_pb2.DrawReceipt:
    others = [draw_pb2.DrawReceipt(draw=f"draws/{number}") for number in range(4)]
    sign_receipts([*others[:2], receipt, *others[2:]], key.sign)
    return receipt


def honest() -> draw_pb2.DrawReceipt:
    """A draw of three from eleven owner groups with two reserves, in which two groups were passed over."""
    tree = SumTree((_group(group), (1 + group) << 32) for group in range(GROUPS))
    anchor, salt = hashlib.sha256(b"leaf").digest(), hashlib.sha256(b"salt").digest()
    sigma = KEY.sign(anchor)
    seed = draw_seed(sigma=sigma, reveal_salt=salt)
    submission = "tasks/t/submissions/4"
    receipt = draw_pb2.DrawReceipt(
        draw=f"draws/{draw_id(submission, 1)}",
        task="tasks/t",
        submission=submission,
        round=1,
        anchor=anchor,
        sigma=sigma,
        reveal_salt=salt,
        seed=seed,
        pool_root=tree.root(),
        pool_weight=_sum(tree.total),
        pool_size=GROUPS,
        curve=task_pb2.CURVE_POWER,
        alpha_millis=500,
        assigned=3,
        draw_time=Timestamp(seconds=1_900_000_000, nanos=5_000),
    )
    for place in islice(draw(seed, tree), 7):
        fields = _fields(tree, place)
        if place.place in PASSED_OVER:
            receipt.passed_over.add(reason=PASSED_OVER[place.place], **fields)
        else:
            members = _members(place.leaf_index)
            participant = drawn_member(seed, place.place, members)
            position = len(receipt.picks)
            receipt.picks.add(position=position, participant=participant, members=members, **fields)
    return signed(receipt)


def _fields(tree: SumTree, place: Place) -> dict[str, Any]:
    return {
        "owner_group": tree.identifier(place.leaf_index),
        "leaf_index": place.leaf_index,
        "place": place.place,
        "group_weight": _sum(place.weight),
        "value": _sum(place.value),
        "path": tree.path(place.leaf_index),
    }


def test_an_honest_receipt_says_what_it_proves() -> None:
    receipt = receipt_from_json(receipt_to_json(honest()))
    assert receipt == honest()
    proved = "\n".join(verify_receipt(receipt, selector_key=KEY.public_key))
    for part in (KEY.public_key.hex(), receipt.draw, receipt.pool_root.hex(), "places 0 to 6", "5 picks", "3 assigned"):
        assert part in proved


@pytest.mark.parametrize("case", VECTORS["receipts"], ids=lambda case: case["name"])
def test_receipts_of_the_vectors(case: dict[str, Any]) -> None:
    """Made by another implementation, after docs/sortition.md alone."""
    receipt = receipt_from_json(json.dumps(case["receipt"]))
    assert json.loads(receipt_to_json(receipt)) == case["receipt"]
    key = bytes.fromhex(case["selector_key"])
    assert verify_receipt(receipt, selector_key=key)
    receipt.draw_time.nanos += 1
    with pytest.raises(ReceiptInvalid, match="not among those signed"):
        verify_receipt(receipt, selector_key=key)


def _leaves(document: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(document, dict | list):
        steps = document.items() if isinstance(document, dict) else enumerate(document)
        for step, below in steps:
            yield from _leaves(below, (*path, step))
    else:
        yield path


def _changes(value: Any) -> Iterator[Any]:
    """Values of the same kind that are not this one."""
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, value - 1, -value - 2)
        case str() if value.lstrip("-").isdigit():
            yield from (str(int(value) + 1), value + "0", f" {value}")
        case str():
            yield from ("", value[:-1], "A" + value[1:] if value[0] != "A" else "B" + value[1:], value + "x")
            last = "1" if value[-1] != "1" else "2"
            yield value[:-1] + last
            # Somewhere in each node of a path, too.
            for at in range(32, len(value) - 4, 64):
                yield value[:at] + ("A" if value[at] != "A" else "B") + value[at + 1 :]
            if value.endswith("="):
                # The last letter before the padding has bits that stand for nothing: another letter, the same bytes.
                body, padding = value.rstrip("="), value[len(value.rstrip("=")) :]
                letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
                other = body[:-1] + letters[letters.index(body[-1]) ^ 1] + padding
                assert base64.b64decode(other) == base64.b64decode(value)
                yield other
                yield body


def test_no_change_of_any_value_gets_through() -> None:
    document = json.loads(receipt_to_json(honest()))
    reasons = set()
    changed_leaves = 0
    for path in _leaves(document):
        owner = document
        for step in path[:-1]:
            owner = owner[step]
        for change in _changes(owner[path[-1]]):
            changed = copy.deepcopy(document)
            target = changed
            for step in path[:-1]:
                target = target[step]
            target[path[-1]] = change
            with pytest.raises(ReceiptInvalid) as refused:
                verify_receipt(receipt_from_json(json.dumps(changed)), selector_key=KEY.public_key)
            reasons.add(refused.value.reason.split(":")[0])
        changed_leaves += 1
    assert changed_leaves > 80
    assert len(reasons) > 10


def test_nothing_can_be_taken_out_or_put_in() -> None:
    document = json.loads(receipt_to_json(honest()))
    for name in document:
        less = {key: value for key, value in document.items() if key != name}
        with pytest.raises(ReceiptInvalid):
            verify_receipt(receipt_from_json(json.dumps(less)), selector_key=KEY.public_key)
    for text in (
        json.dumps(document | {"note": "verified"}),
        json.dumps(document)[:-1] + ', "round": 1}',
        json.dumps(document | {"round": float(document["round"])}),
        json.dumps(document | {"\ud800": 1}),
        "[]",
        "{}",
        "null",
        "not json",
        "[" * 100_000,
    ):
        with pytest.raises(ReceiptInvalid):
            verify_receipt(receipt_from_json(text), selector_key=KEY.public_key)


def test_fields_that_have_their_default_may_be_left_out() -> None:
    document = json.loads(receipt_to_json(honest()))
    for pick in document["picks"]:
        if pick["position"] == 0:
            del pick["position"]
    with pytest.raises(ReceiptInvalid, match="one way"):
        receipt_from_json(json.dumps(document))
    for each in (*document["picks"], *document["passed_over"]):
        for name in ("place", "position"):
            if each.get(name) == 0:
                del each[name]
        if each["leaf_index"] == "0":
            del each["leaf_index"]
    assert receipt_from_json(json.dumps(document)) == honest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.ClearField("passed_over"), "is missing"),
        (lambda r: r.picks.pop(), ""),
        (lambda r: r.picks[0].CopyFrom(r.picks[1]), "two places|order of their places|is missing"),
        (lambda r: setattr(r, "seed", bytes(32)), "does not follow from sigma"),
        (lambda r: setattr(r, "sigma", KEY.sign(b"else")), "not this selector's signature over the anchor"),
        (lambda r: setattr(r, "assigned", 6), "are said to be assigned"),
        (lambda r: setattr(r, "round", 2), "does not follow from submission and round"),
        (lambda r: setattr(r, "task", "tasks/u"), "not one of the task"),
        (lambda r: setattr(r, "pool_weight", _sum(1)), "does not lead to the root"),
        (lambda r: setattr(r, "anchor", b"short"), "bytes"),
        (lambda r: setattr(r.picks[0], "value", _sum(7)), "does not follow from the seed"),
        (lambda r: setattr(r.picks[0], "group_weight", b""), "bytes"),
        (lambda r: setattr(r.picks[0], "path", r.picks[0].path[:-1]), "nodes of 48 bytes"),
        (lambda r: setattr(r.picks[1], "position", 0), "position"),
        (lambda r: r.picks[0].ClearField("members"), "members"),
        (lambda r: setattr(r.picks[0], "participant", "participants/x"), "another member"),
        (lambda r: setattr(r.passed_over[0], "reason", 0), "without a reason"),
    ],
)
def test_a_selector_that_signs_a_lie_is_found_out(change: Any, reason: str) -> None:
    """The signature is right: what remains is the order's own proof. Taking the last reserve away is no lie."""
    receipt = honest()
    change(receipt)
    if not reason:
        verify_receipt(signed(receipt), selector_key=KEY.public_key)
        return
    with pytest.raises(ReceiptInvalid, match=reason):
        verify_receipt(signed(receipt), selector_key=KEY.public_key)


def test_receipts_signed_together_are_checked_one_by_one() -> None:
    asked: list[bytes] = []

    def sign(message: bytes) -> bytes:
        asked.append(message)
        return KEY.sign(message)

    receipts = [honest() for _ in range(7)]
    for number, receipt in enumerate(receipts):
        receipt.draw_time.nanos = 1000 * number
    sign_receipts(receipts, sign)
    assert len(asked) == 1
    # Longer than an anchor, which others choose: what they can have signed is never a signature of receipts.
    assert len(asked[0]) > 32
    for receipt in receipts:
        verify_receipt(receipt, selector_key=KEY.public_key)
    assert [(receipt.signed.index, receipt.signed.size) for receipt in receipts] == [(i, 7) for i in range(7)]
    lent = honest()
    lent.signed.CopyFrom(receipts[3].signed)
    with pytest.raises(ReceiptInvalid, match="not among those signed"):
        verify_receipt(lent, selector_key=KEY.public_key)


def test_a_receipt_asked_for_twice_at_once_is_signed_once() -> None:
    twice = [honest(), honest(), honest()]
    twice[1].draw_time.nanos = 0
    sign_receipts(twice, KEY.sign)
    assert twice[0] == twice[2]
    assert [receipt.signed.size for receipt in twice] == [2, 2, 2]
    verify_receipt(twice[0], selector_key=KEY.public_key)
    # Were the two alike two leaves, each would do with the other's index.
    for index in (1, 2, -1):
        twice[0].signed.index = index
        with pytest.raises(ReceiptInvalid, match="not among those signed"):
            verify_receipt(twice[0], selector_key=KEY.public_key)


def test_the_key_is_the_selectors_and_has_a_point_that_a_key_can_have() -> None:
    infinity = bytes([0xC0]) + bytes(47)
    for key in (infinity, bytes(48), b"", KEY.public_key[:-1], b"\xff" * 48):
        with pytest.raises(ReceiptInvalid, match="the key"):
            verify_receipt(honest(), selector_key=key)
    with pytest.raises(ReceiptInvalid, match="sigma"):
        verify_receipt(honest(), selector_key=BlsKey(b"o" * 32).public_key)
    # What a key at infinity would sign: every message has the signature at infinity.
    forged = honest()
    forged.sigma = forged.signed.signature = bytes([0xC0]) + bytes(95)
    with pytest.raises(ReceiptInvalid, match="infinity"):
        verify_receipt(forged, selector_key=infinity)


def test_the_command_exits_with_1_and_the_reason(tmp_path: Path) -> None:
    receipt, key = tmp_path / "receipt.json", tmp_path / "selector.pub"
    receipt.write_text(receipt_to_json(honest()))
    key.write_text(KEY.public_key.hex() + "\n")

    def verify(*options: str) -> Any:
        return CliRunner().invoke(app, ["draw", "verify", str(receipt), "--key", str(key), *options])

    good = verify()
    assert good.exit_code == 0
    assert good.stdout.count("proved: ") == 5
    assert all(f"not proved here: {claim}" in good.stdout for claim in NOT_PROVED)
    assert json.loads(verify("--json").stdout)["verified"] is True
    changed = honest()
    changed.picks[0].participant, changed.picks[1].participant = (
        changed.picks[1].participant,
        changed.picks[0].participant,
    )
    receipt.write_text(receipt_to_json(changed))
    bad = verify()
    assert (bad.exit_code, bad.stdout) == (1, "")
    assert bad.stderr == "not verified: pick 0: the seed picks another member of the owner group\n"
    assert json.loads(verify("--json").stdout)["verified"] is False
    key.write_text("no key")
    assert verify().exit_code == 1
    key.unlink()
    assert verify().exit_code == 1


def test_what_a_draw_made_of_a_participant_is_told() -> None:
    receipt = honest()
    first, over = receipt.picks[0], receipt.passed_over[0]
    assert outcome_of(receipt, first.participant, first.owner_group) == ("picked at place 0, assigned", 0)
    last = receipt.picks[-1]
    assert "a reserve" in outcome_of(receipt, last.participant, last.owner_group)[0]
    told, place = outcome_of(receipt, "participants/x", over.owner_group)
    assert (told, place) == ("passed over at place 1: all members of its owner group were paused", 1)
    many = next(pick for pick in receipt.picks if len(pick.members) > 1)
    other = next(member for member in many.members if member != many.participant)
    assert "went to another member" in outcome_of(receipt, other, many.owner_group)[0]
    assert outcome_of(receipt, "participants/x", "x")[1] is None
