"""Receipts of draws: written as JSON, and checked offline with nothing but the selector's public key.

What is checked and what it proves is written out in docs/sortition.md.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf import json_format

from tiltyard import bls
from tiltyard.commitments import draw_seed
from tiltyard.sortition import Place, ProvedPlace, check_order, draw_id, drawn_member
from tiltyard.sumtree import HASH_BYTES, SUM_BYTES
from tiltyard.transparency import Frontier, Node, inclusion_proof, leaf_hash, verify_inclusion
from tiltyard.type.v1 import draw_pb2

# With the root and the size after it this is longer than an anchor of 32 bytes, and whoever asks for a draw chooses the
# anchor: a sigma must never be a signature of receipts.
_SIGNED_TAG = b"tiltyard/draw-receipts/v1"

NOT_PROVED = (
    "that the pool under the root is what the ledger says: deposits, locks, weights and groups are in the record log",
    "that groups were passed over for the reason given: memberships and charges are in the record log",
    "that the anchor is in the record log, where it was before anyone could know sigma",
)
"""What a receipt by itself cannot show, and where to look for it."""


class ReceiptInvalid(Exception):
    """A receipt that does not hold; `reason` says what about it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def sign_receipts(receipts: Sequence[draw_pb2.DrawReceipt], sign: Callable[[bytes], bytes]) -> None:
    """Puts one signature into all receipts: `sign` is asked once, over the root of the tree whose leaves they are."""
    leaves = [_leaf(receipt) for receipt in receipts]
    # Those that are alike are one leaf, so that each has one index and none is proved by another's.
    indices = {leaf: index for index, leaf in enumerate(dict.fromkeys(leaves))}
    tree, nodes = Frontier(), dict[Node, bytes]()
    for leaf in indices:
        nodes.update(tree.append(leaf))
    root = tree.root()
    signature = sign(_signed_message(root, tree.size))
    for receipt, leaf in zip(receipts, leaves, strict=True):
        index = indices[leaf]
        path = inclusion_proof(index, tree.size, lambda level, at: nodes[level, at])
        signed = draw_pb2.BatchSignature(root=root, size=tree.size, index=index, path=path, signature=signature)
        receipt.signed.CopyFrom(signed)


def receipt_to_json(receipt: draw_pb2.DrawReceipt) -> str:
    """A receipt in protobuf's JSON form, with the contract's snake_case names and every field written."""
    return json.dumps(_document(receipt, every_field=True), indent=2) + "\n"


def receipt_from_json(text: str) -> draw_pb2.DrawReceipt:
    """Reads what `receipt_to_json` wrote; fields that have their default value may be left out.

    Raises ReceiptInvalid for anything else, a value written in another way included: what is not signed cannot hide.
    """
    try:
        document = json.loads(text, object_pairs_hook=_once_each)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        # A name that no UTF-8 can hold is an error of its own kind to protobuf.
        json.dumps(document, ensure_ascii=False).encode()
        receipt = json_format.ParseDict(document, draw_pb2.DrawReceipt())
    except (ValueError, json_format.ParseError, RecursionError) as error:
        raise ReceiptInvalid(f"this is no receipt: {error}") from error
    # As text: to Python 1.0 is 1.
    if _sorted(document) not in {_sorted(_document(receipt, every_field=every)) for every in (True, False)}:
        raise ReceiptInvalid("a value is not written in the one way that protobuf's JSON form has for it")
    return receipt


def verify_receipt(receipt: draw_pb2.DrawReceipt, *, selector_key: bytes) -> list[str]:
    """Checks a receipt against the selector's BLS public key of 48 bytes. Returns what has been proved, in words.

    Raises ReceiptInvalid with the first thing that does not hold.
    """
    if not bls.is_public_key(selector_key):
        raise ReceiptInvalid("the key is no BLS public key of 48 bytes, or lies at infinity")
    _check_names(receipt)
    if not bls.verify(selector_key, receipt.anchor, receipt.sigma):
        raise ReceiptInvalid("sigma is not this selector's signature over the anchor")
    if receipt.seed != draw_seed(sigma=receipt.sigma, reveal_salt=receipt.reveal_salt):
        raise ReceiptInvalid("the seed does not follow from sigma and the reveal's salt")
    places = _check_places(receipt)
    _check_members(receipt)
    _check_signature(receipt, selector_key)
    picks = len(receipt.picks)
    return [
        f"the selector with key {selector_key.hex()} signed every value of this receipt of {receipt.draw}",
        "sigma is the one signature that this key has for the anchor, so nobody could choose it",
        "the seed follows from sigma and the reveal's salt",
        f"places 0 to {places - 1} of the order were drawn by this seed, in proportion to weight, from the "
        f"{receipt.pool_size} owner groups under pool root {receipt.pool_root.hex()}",
        f"the {picks} picks are the members of their owner groups whom the seed picks, {receipt.assigned} assigned "
        f"and {picks - receipt.assigned} in reserve; {len(receipt.passed_over)} owner groups were passed over",
    ]


def _check_names(receipt: draw_pb2.DrawReceipt) -> None:
    if not receipt.submission.startswith(f"{receipt.task}/submissions/"):
        raise ReceiptInvalid("the submission is not one of the task")
    if receipt.draw != f"draws/{draw_id(receipt.submission, receipt.round)}":
        raise ReceiptInvalid("the draw's name does not follow from submission and round")
    for name, value, size in (
        ("anchor", receipt.anchor, HASH_BYTES),
        ("reveal_salt", receipt.reveal_salt, HASH_BYTES),
        ("pool_root", receipt.pool_root, HASH_BYTES),
        ("pool_weight", receipt.pool_weight, SUM_BYTES),
    ):
        if len(value) != size:
            raise ReceiptInvalid(f"{name} has {len(value)} bytes, not {size}")
    if not 1 <= receipt.assigned <= len(receipt.picks):
        raise ReceiptInvalid(f"{receipt.assigned} are said to be assigned, of {len(receipt.picks)} picks")


def _check_places(receipt: draw_pb2.DrawReceipt) -> int:
    for kind, listed in (("picks", receipt.picks), ("passed_over", receipt.passed_over)):
        places = [each.place for each in listed]
        if places != sorted(places):
            raise ReceiptInvalid(f"{kind} are not in the order of their places")
    proved = sorted(_proved(receipt), key=lambda each: each.place.place)
    groups = [each.identifier for each in proved]
    if len(set(groups)) != len(groups):
        raise ReceiptInvalid("an owner group has two places")
    try:
        check_order(
            receipt.seed,
            proved,
            root=receipt.pool_root,
            leaf_count=receipt.pool_size,
            total=_number(receipt.pool_weight),
        )
    except ValueError as error:
        raise ReceiptInvalid(str(error)) from error
    return len(proved)


def _proved(receipt: draw_pb2.DrawReceipt) -> Iterator[ProvedPlace]:
    entries: list[draw_pb2.Pick | draw_pb2.PassedOver] = [*receipt.picks, *receipt.passed_over]
    for each in entries:
        place = Place(each.place, each.leaf_index, _number(each.group_weight), _number(each.value))
        yield ProvedPlace(place, each.owner_group, each.path)


def _check_members(receipt: draw_pb2.DrawReceipt) -> None:
    for position, pick in enumerate(receipt.picks):
        if pick.position != position:
            raise ReceiptInvalid(f"pick {position} is said to be at position {pick.position}")
        members = list(pick.members)
        if not members or members != sorted(set(members)):
            raise ReceiptInvalid(f"pick {position}: the members of its owner group are not in order of id, each once")
        if pick.participant != drawn_member(receipt.seed, pick.place, members):
            raise ReceiptInvalid(f"pick {position}: the seed picks another member of the owner group")
    for each in receipt.passed_over:
        if each.reason == draw_pb2.PASSED_OVER_REASON_UNSPECIFIED:
            raise ReceiptInvalid(f"place {each.place} was passed over without a reason")


def _check_signature(receipt: draw_pb2.DrawReceipt, selector_key: bytes) -> None:
    signed = receipt.signed
    if any(len(node) != HASH_BYTES for node in (signed.root, *signed.path)):
        raise ReceiptInvalid("a hash of the tree of receipts that were signed together has not 32 bytes")
    included = verify_inclusion(
        leaf=_leaf(receipt), index=signed.index, size=signed.size, path=list(signed.path), root=signed.root
    )
    if not included:
        raise ReceiptInvalid(
            "this receipt is not among those signed: its path, or a value that nothing else fixes, was changed"
        )
    if not bls.verify(selector_key, _signed_message(signed.root, signed.size), signed.signature):
        raise ReceiptInvalid("the selector did not sign this receipt: the signature is not this key's over the root")


def _leaf(receipt: draw_pb2.DrawReceipt) -> bytes:
    """What stands for a receipt in the tree: the hash of its bytes without the signature, fields in order of number."""
    if receipt.HasField("signed"):
        receipt, whole = draw_pb2.DrawReceipt(), receipt
        receipt.CopyFrom(whole)
        receipt.ClearField("signed")
    return leaf_hash(receipt.SerializeToString(deterministic=True))


def _signed_message(root: bytes, size: int) -> bytes:
    return _SIGNED_TAG + size.to_bytes(8, "big") + root


def _number(sum_bytes: bytes) -> int:
    if len(sum_bytes) != SUM_BYTES:
        raise ReceiptInvalid(f"a sum or weight has {len(sum_bytes)} bytes, not {SUM_BYTES}")
    return int.from_bytes(sum_bytes, "big")


def _document(receipt: draw_pb2.DrawReceipt, *, every_field: bool) -> dict[str, Any]:
    return json_format.MessageToDict(
        receipt, preserving_proto_field_name=True, always_print_fields_with_no_presence=every_field
    )


def _sorted(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a name is there twice")
    return document
