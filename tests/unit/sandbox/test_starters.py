"""Which mounts of the host make a sandbox begun ahead stale, and under which limits one is begun."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox.plan import Limits
from sandbox.starters import ROOMY, UNLIMITED, _roomy, _shows


@pytest.mark.parametrize("place", [b"/", b"/usr", b"/usr/local", b"/etc", b"/etc/ssl/certs", b"/dev/pts", b"/lib64"])
def test_what_is_shown_inside_counts(place: bytes) -> None:
    assert _shows(place)


@pytest.mark.parametrize(
    "place", [b"/run/netns/blue", b"/var/lib/docker/overlay2/x/merged", b"/user", b"/mnt", b"/proc"]
)
def test_what_is_not_shown_does_not(place: bytes) -> None:
    assert not _shows(place)


def test_nobody_begins_under_limits_that_are_too_tight_for_it() -> None:
    assert _roomy(Limits())
    assert _roomy(UNLIMITED)
    for name in ("memory_bytes", "cpus", "pids"):
        assert not _roomy(replace(ROOMY, **{name: getattr(ROOMY, name) / 2}))
