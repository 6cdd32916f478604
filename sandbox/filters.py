"""Compiled system-call filters as they travel: the program of pid 1 and those of the agent in one blob."""

import struct
from collections.abc import Sequence
from typing import Final

from sandbox.decoding import InvalidPlan

_PACK_MAGIC: Final = b"SKF1"
FILTERS_MAX: Final = 4


def pack_filters(programs: Sequence[bytes]) -> bytes:
    """Put BPF programs into one blob, in the order in which they are to be installed."""
    if not 0 < len(programs) <= FILTERS_MAX:
        raise InvalidPlan(f"filter: 1..{FILTERS_MAX} programs, not {len(programs)}")
    lengths = b"".join(struct.pack("<I", len(program)) for program in programs)
    return _PACK_MAGIC + struct.pack("<I", len(programs)) + lengths + b"".join(programs)


def unpack_filters(blob: bytes) -> tuple[bytes, ...]:
    """Undo `pack_filters`; raises `InvalidPlan` on anything else."""
    if blob[:4] != _PACK_MAGIC or len(blob) < 8:  # noqa: PLR2004 - magic and count
        raise InvalidPlan("filter: not made by pack_filters")
    (count,) = struct.unpack_from("<I", blob, 4)
    if not 0 < count <= FILTERS_MAX or len(blob) < 8 + 4 * count:
        raise InvalidPlan("filter: header is cut short or has a wrong count")
    lengths = struct.unpack_from(f"<{count}I", blob, 8)
    start = 8 + 4 * count
    if start + sum(lengths) != len(blob) or any(length == 0 or length % 8 for length in lengths):
        raise InvalidPlan("filter: lengths do not fit the content")
    programs = []
    for length in lengths:
        programs.append(blob[start : start + length])
        start += length
    return tuple(programs)


def agent_filters(blob: bytes) -> tuple[bytes, ...]:
    """Give the programs of an agent's own processes: all but the first."""
    return unpack_filters(blob)[1:]


def init_filter(blob: bytes) -> bytes:
    """Give the program of pid 1, which is the first: it waits and ends, and needs little for that."""
    return unpack_filters(blob)[0]
