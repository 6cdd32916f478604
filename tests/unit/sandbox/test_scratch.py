"""What an image must be like for a limit."""

from __future__ import annotations

import pytest

from sandbox.scratch import BLOCK_BYTES, INODE_BYTES, INODES_MAX, INODES_MIN, geometry


@pytest.mark.parametrize("disk", [1 << 16, 1 << 20, 1 << 30, 1 << 36])
def test_the_image_has_room_for_the_limit_and_little_more(disk: int) -> None:
    wanted = geometry(disk)
    own = wanted.image_bytes - disk - wanted.inodes * INODE_BYTES
    assert wanted.image_bytes % BLOCK_BYTES == 0
    assert (1 << 20) <= own <= disk // 40 + (2 << 20)


def test_inodes_grow_with_the_limit_and_stay_within_bounds() -> None:
    assert geometry(1 << 16).inodes == INODES_MIN
    assert geometry(1 << 30).inodes == 65536
    assert geometry(1 << 45).inodes == INODES_MAX
