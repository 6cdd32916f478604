"""Which sealed segments are kept no longer (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sealed:
    """A segment that nothing is written to any more."""

    first_seq: int
    last_seq: int
    size_bytes: int
    ended_at_seconds: float  # when its last entry was written


def retired(
    sealed: Sequence[Sealed], *, open_bytes: int, now_seconds: float, keep_seconds: float, keep_bytes: int
) -> int:
    """How many of `sealed`, oldest first, are to go; 0 seconds or bytes is no limit.

    Only from the old end: what is kept is one piece, up to the segment that is being written.
    """
    old = 0
    if keep_seconds:
        for segment in sealed:
            if now_seconds - segment.ended_at_seconds <= keep_seconds:
                break
            old += 1
    total = open_bytes + sum(segment.size_bytes for segment in sealed)
    many = 0
    if keep_bytes:
        for segment in sealed:
            if total <= keep_bytes:
                break
            total -= segment.size_bytes
            many += 1
    return max(old, many)
