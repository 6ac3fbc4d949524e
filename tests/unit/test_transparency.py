"""Merkle trees and notes against the published vectors of RFC 6962 and C2SP, and proofs over every small tree."""

import base64
import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltyard.identity import Key
from tiltyard.transparency import (
    EMPTY_ROOT,
    Checkpoint,
    Frontier,
    InvalidNote,
    checkpoint_body,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    parse_checkpoint,
    root_hash,
    sign_note,
    verify_consistency,
    verify_inclusion,
    verify_note,
)

# The leaves and roots that every implementation of RFC 6962 is tested with.
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
HASHES = [leaf_hash(leaf) for leaf in LEAVES]


def reader(hashes: Sequence[bytes], size: int):  # type: ignore[no-untyped-def]
    """Nodes of a tree that was grown one leaf by one; none beyond `size` may be asked for."""
    nodes = {}
    frontier = Frontier()
    for value in hashes[:size]:
        nodes.update(frontier.append(value))
    return lambda level, index: nodes[level, index]


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_the_published_ones(size: int) -> None:
    assert root_hash(HASHES[:size]).hex() == ROOTS[size - 1]


def test_the_empty_tree_is_the_hash_of_nothing() -> None:
    assert root_hash([]) == EMPTY_ROOT == hashlib.sha256().digest()


def test_inclusion_proofs_are_the_published_ones() -> None:
    assert [node.hex() for node in inclusion_proof(5, 8, reader(HASHES, 8))] == [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert [node.hex() for node in inclusion_proof(2, 3, reader(HASHES, 3))] == [ROOTS[1]]


def test_consistency_proofs_are_the_published_ones() -> None:
    assert [node.hex() for node in consistency_proof(6, 8, reader(HASHES, 8))] == [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]
    assert [node.hex() for node in consistency_proof(1, 8, reader(HASHES, 8))] == [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]


def test_every_proof_of_every_small_tree_verifies_and_no_other() -> None:
    hashes = [leaf_hash(bytes([number])) for number in range(20)]
    roots = [root_hash(hashes[:size]) for size in range(21)]
    for size in range(1, 21):
        read = reader(hashes, size)
        for index in range(size):
            path = inclusion_proof(index, size, read)
            asked = {"index": index, "size": size, "path": path, "root": roots[size]}
            assert verify_inclusion(leaf=hashes[index], **asked)
            assert not verify_inclusion(leaf=leaf_hash(b"other"), **asked)
            assert not verify_inclusion(leaf=hashes[index], **{**asked, "path": [*path, roots[1]]})
            assert not verify_inclusion(leaf=hashes[index], **{**asked, "root": roots[0]})
        for old in range(size + 1):
            path = consistency_proof(old, size, read)
            known = {"old_size": old, "new_size": size, "old_root": roots[old], "new_root": roots[size]}
            assert verify_consistency(path=path, **known)
            assert not verify_consistency(path=[*path, roots[1]], **known)
            # Every tree grows from the empty one: only then does the newer root not matter.
            assert verify_consistency(path=path, **{**known, "new_root": leaf_hash(b"other")}) == (old == 0)
            assert not verify_consistency(path=path, **{**known, "old_root": leaf_hash(b"other")})


@given(st.integers(0, 300), st.integers(0, 40))
def test_a_frontier_read_back_goes_on_where_it_was(size: int, more: int) -> None:
    hashes = [leaf_hash(number.to_bytes(4, "big")) for number in range(size + more)]
    frontier = Frontier()
    for value in hashes[:size]:
        frontier.append(value)
    read_back = Frontier(frontier.size, frontier.hashes)
    for value in hashes[size:]:
        read_back.append(value)
    assert read_back.size == size + more
    assert read_back.root() == root_hash(hashes)


def test_a_frontier_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 hashes"):
        Frontier(3, [HASHES[0]])


def test_proofs_beyond_the_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="no leaf 3"):
        inclusion_proof(3, 3, reader(HASHES, 3))
    with pytest.raises(ValueError, match="no beginning"):
        consistency_proof(4, 3, reader(HASHES, 3))
    assert not verify_inclusion(leaf=HASHES[0], index=3, size=3, path=[], root=HASHES[0])
    assert node_hash(HASHES[0], HASHES[1]).hex() == ROOTS[1]


def test_a_checkpoint_is_signed_and_read_back() -> None:
    key = Key.generate()
    checkpoint = Checkpoint("arena.example", 8, bytes.fromhex(ROOTS[7]))
    note = sign_note(key, name="arena.example", body=checkpoint_body(checkpoint))
    assert note.startswith(
        "arena.example\n8\n" + base64.b64encode(checkpoint.root).decode() + "\n\n\u2014 arena.example "
    )
    body = verify_note(note, name="arena.example", public_key=key.public_bytes)
    assert parse_checkpoint(body) == checkpoint


def test_a_note_of_another_key_name_or_text_is_refused() -> None:
    key, other = Key.generate(), Key.generate()
    note = sign_note(key, name="arena.example", body="arena.example\n0\nAAAA\n")
    for changed, name, public_key in (
        (note, "arena.example", other.public_bytes),
        (note, "else.example", key.public_bytes),
        (note.replace("\n0\n", "\n1\n"), "arena.example", key.public_bytes),
        ("no signature\n", "arena.example", key.public_bytes),
        (note.replace("\u2014", "-"), "arena.example", key.public_bytes),
    ):
        with pytest.raises(InvalidNote):
            verify_note(changed, name=name, public_key=public_key)


def test_a_second_signature_line_does_not_hide_the_first() -> None:
    key, witness = Key.generate(), Key.generate()
    body = "arena.example\n0\nAAAA\n"
    note = sign_note(key, name="arena.example", body=body)
    note += sign_note(witness, name="witness.example", body=body).removeprefix(body + "\n")
    assert verify_note(note, name="arena.example", public_key=key.public_bytes) == body
    assert verify_note(note, name="witness.example", public_key=witness.public_bytes) == body


@pytest.mark.parametrize("name", ["", "two words", "a+b"])
def test_a_key_name_that_would_break_the_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of a note"):
        sign_note(Key.generate(), name=name, body="text\n")


@pytest.mark.parametrize("body", ["", "a\n", "a\n1\n", "a\n01\nAAAA\n", "a\n1\nAAAA\n", "a\n1\n!\n", "\n1\nAAAA\n"])
def test_a_malformed_checkpoint_is_refused(body: str) -> None:
    with pytest.raises(InvalidNote):
        parse_checkpoint(body)
