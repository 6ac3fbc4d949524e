"""The record log's vectors for readers in other languages hold for this implementation too."""

import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiltyard.commitments import evaluation_seal, submission_commitment
from tiltyard.identity import Key
from tiltyard.statements import sign_statement
from tiltyard.transparency import (
    Checkpoint,
    checkpoint_body,
    leaf_hash,
    parse_checkpoint,
    root_hash,
    sign_note,
    verify_consistency,
    verify_inclusion,
    verify_note,
)
from tiltyard.type.v1 import envelope_pb2

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "transparency.json").read_text())
LEAVES = [leaf_hash(entry.encode()) for entry in VECTORS["entries"]]
KEY = Key(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["checkpoint"]["seed"])))


def test_inclusion_vectors_hold() -> None:
    for vector in VECTORS["inclusion"]:
        root = bytes.fromhex(vector["root"])
        assert bytes.fromhex(vector["leaf"]) == LEAVES[vector["index"]]
        assert root == root_hash(LEAVES[: vector["size"]])
        path = [bytes.fromhex(node) for node in vector["path"]]
        leaf, index, size = LEAVES[vector["index"]], vector["index"], vector["size"]
        assert verify_inclusion(leaf=leaf, index=index, size=size, path=path, root=root)
        assert not verify_inclusion(leaf=leaf, index=index, size=size, path=[*path, leaf], root=root)


def test_consistency_vectors_hold() -> None:
    for vector in VECTORS["consistency"]:
        old, new = bytes.fromhex(vector["old_root"]), bytes.fromhex(vector["new_root"])
        path = [bytes.fromhex(node) for node in vector["path"]]
        sizes = {"old_size": vector["old_size"], "new_size": vector["new_size"]}
        assert verify_consistency(**sizes, path=path, old_root=old, new_root=new)
        assert not verify_consistency(**sizes, path=path, old_root=bytes(32), new_root=new)


def test_checkpoint_vector_is_what_the_key_signs() -> None:
    vector = VECTORS["checkpoint"]
    checkpoint = Checkpoint(vector["name"], vector["size"], bytes.fromhex(vector["root"]))
    assert sign_note(KEY, name=vector["name"], body=checkpoint_body(checkpoint)) == vector["note"]
    body = verify_note(vector["note"], name=vector["name"], public_key=KEY.public_bytes)
    assert parse_checkpoint(body) == checkpoint


def test_statement_vector_is_what_the_key_signs() -> None:
    vector = VECTORS["statement"]
    assert vector["participant"] == KEY.id
    names = {"origin": vector["origin"], "task": vector["task"], "participant": f"participants/{KEY.id}"}
    salt = bytes.fromhex(vector["salt"])
    commitment = submission_commitment(**names, model_digest=bytes.fromhex(vector["model_digest"]), salt=salt)
    assert commitment.hex() == vector["commitment"]
    envelope = sign_statement(KEY, envelope_pb2.CommitStatement(**names, commitment=commitment))
    assert (envelope.payload_type, envelope.payload.hex()) == (vector["payload_type"], vector["payload"])
    assert envelope.signature.hex() == vector["signature"]
    seal = vector["seal"]
    report = bytes.fromhex(seal["report"])
    assert evaluation_seal(assignment=seal["assignment"], report=report, salt=salt).hex() == seal["value"]
