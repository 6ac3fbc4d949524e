"""Collects every violation of a request's fields, so that a caller learns all of them in one answer."""

import math
import unicodedata
from collections.abc import Collection, Sized

from services.runtime.errors import FieldViolation, InvalidArgument

DIGEST_BYTES = 32
REQUEST_ID_CHARS = 64
# Cc control, Cf invisible formatting (bidirectional overrides), Cs surrogates, Zl and Zp line separators: a name that
# shows as another name on a terminal is not a name.
UNSEEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class FieldChecks:
    """Checks fields one by one; `finish` raises a single InvalidArgument that names every bad one.

    Each check returns whether the field passed, so that a later check can depend on an earlier one.
    """

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def fail(self, field: str, description: str) -> None:
        """Notes a violation found by the caller."""
        self._violations.append(FieldViolation(field, description))

    def require(self, field: str, holds: object, description: str = "is required") -> bool:
        """`holds` is true (or not empty)."""
        if not holds:
            self.fail(field, description)
        return bool(holds)

    def text(self, field: str, value: str, *, max_chars: int, min_chars: int = 1) -> bool:
        """A text of `min_chars` to `max_chars` characters, not blank, without control characters or line breaks."""
        if not value and min_chars > 0:
            return self.require(field, False, "is required")
        if len(value) < min_chars or len(value) > max_chars:
            return self.require(field, False, f"has {len(value)} characters, allowed are {min_chars} to {max_chars}")
        if value and not value.strip():
            return self.require(field, False, "is blank")
        if any(unicodedata.category(char) in UNSEEN_CATEGORIES for char in value):
            return self.require(field, False, "holds control characters")
        return True

    def compared_text(self, field: str, value: str, *, max_chars: int) -> bool:
        """As `text`, for one by which things are told apart: what looks alike must be alike.

        No white space at its ends, and in Unicode's composed form (NFC).
        """
        if not self.text(field, value, max_chars=max_chars):
            return False
        if value != value.strip():
            return self.require(field, False, "has white space at its beginning or end")
        return self.require(field, unicodedata.is_normalized("NFC", value), "is not in Unicode's composed form (NFC)")

    def range(self, field: str, value: float, *, minimum: float, maximum: float, unit: str = "") -> bool:
        """A finite number in [minimum, maximum]."""
        if math.isfinite(value) and minimum <= value <= maximum:
            return True
        suffix = f" {unit}" if unit else ""
        return self.require(field, False, f"is {value}, allowed are {minimum} to {maximum}{suffix}")

    def count(self, field: str, values: Sized, *, minimum: int = 0, maximum: int) -> bool:
        """A repeated field of `minimum` to `maximum` elements."""
        size = len(values)
        return self.require(
            field, minimum <= size <= maximum, f"has {size} elements, allowed are {minimum} to {maximum}"
        )

    def digest(self, field: str, value: bytes) -> bool:
        """A SHA-256 digest: 32 raw bytes."""
        return self.octets(field, value, size=DIGEST_BYTES)

    def octets(self, field: str, value: bytes, *, size: int) -> bool:
        """Exactly `size` raw bytes."""
        if not value:
            return self.require(field, False, "is required")
        return self.require(field, len(value) == size, f"has {len(value)} bytes, must be {size}")

    def one_of(self, field: str, value: int, allowed: Collection[int], *, unspecified: int = 0) -> bool:
        """An enum value that is set and known."""
        if value == unspecified:
            return self.require(field, False, "is required")
        return self.require(field, value in allowed, f"is {value}, which is not known")

    def finish(self) -> None:
        """Raises InvalidArgument when a check has failed."""
        if self._violations:
            raise InvalidArgument(self._violations)


def check_request_id(value: str) -> None:
    """A request id is empty (not idempotent) or 1 to 64 printable ASCII characters.

    Raises InvalidArgument.
    """
    if len(value) > REQUEST_ID_CHARS or not (value.isascii() and value.isprintable()):
        raise InvalidArgument.field("request_id", f"must be 1 to {REQUEST_ID_CHARS} printable ASCII characters")
