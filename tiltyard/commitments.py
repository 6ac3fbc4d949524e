"""Hashes that bind somebody to something before it is shown: commitments, seals, and the seed of a draw.

Every hash is SHA-256 over a domain tag and the fields in order, each preceded by its length as four big-endian
bytes, so that no two different lists of fields give the same input. docs/commitments.md has the test vectors' text.
"""

import hashlib
import hmac

SUBMISSION_TAG = b"tiltyard/submission-commitment/v1"
SEAL_TAG = b"tiltyard/evaluation-seal/v1"
SEED_TAG = b"tiltyard/draw-seed/v1"
HOLDOUT_ANCHOR_TAG = b"tiltyard/holdout-anchor/v1"
SCORE_TAG = b"tiltyard/score-commitment/v1"

DIGEST_BYTES = 32
SALT_BYTES = 32


def tagged_hash(tag: bytes, *fields: bytes) -> bytes:
    """SHA-256 over `tag` and `fields`, each preceded by its length in four big-endian bytes. 32 bytes."""
    digest = hashlib.sha256()
    for field in (tag, *fields):
        digest.update(len(field).to_bytes(4, "big"))
        digest.update(field)
    return digest.digest()


def submission_commitment(*, origin: str, task: str, participant: str, model_digest: bytes, salt: bytes) -> bytes:
    """What a training node commits to before it shows its model.

    `task` and `participant` are resource names; `model_digest` and `salt` are 32 bytes each.
    """
    _check_salted(model_digest, salt)
    return tagged_hash(SUBMISSION_TAG, origin.encode(), task.encode(), participant.encode(), model_digest, salt)


def evaluation_seal(*, assignment: str, report: bytes, salt: bytes) -> bytes:
    """What a validator seals before reports are opened. `report` is the payload of the report's envelope."""
    _check_salt(salt)
    return tagged_hash(SEAL_TAG, assignment.encode(), report, salt)


def draw_seed(*, sigma: bytes, reveal_salt: bytes) -> bytes:
    """The seed of a draw: nobody knows it before the selector has signed, and nobody can choose it later."""
    _check_salt(reveal_salt)
    return tagged_hash(SEED_TAG, sigma, reveal_salt)


def holdout_anchor(*, holdout_leaf: bytes, submission: str) -> bytes:
    """What sigma is over in round 2: the hash of the holdout's leaf, and the submission."""
    return tagged_hash(HOLDOUT_ANCHOR_TAG, holdout_leaf, submission.encode())


def score_commitment(*, score: bytes, salt: bytes) -> bytes:
    """What the log holds of a score whose task has LADDER visibility, until the task is closed."""
    _check_salt(salt)
    return tagged_hash(SCORE_TAG, score, salt)


def matches(left: bytes, right: bytes) -> bool:
    """Equality in time that does not depend on the bytes."""
    return hmac.compare_digest(left, right)


def _check_salted(digest: bytes, salt: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    _check_salt(salt)


def _check_salt(salt: bytes) -> None:
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
