"""How often in a day what stays in the record may be caused; services.runtime.daily counts."""

from typing import Protocol


class Daily(Protocol):
    """Counts for the caller of the call being served."""

    def count_stranger(self) -> None:
        """Before what anybody may cause who has made a key is recorded. Raises ResourceExhausted with the wait."""
        ...

    def count_change(self) -> None:
        """Before a change that a member or creator makes as often as it likes. Raises ResourceExhausted too."""
        ...
