"""The targets of ./bootstrap fuzz hold for their seeds and for what hypothesis makes; and they can fail."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress import mcpcall, target
from tests.fuzz.targets import SEEDS, TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_hold(name: str) -> None:
    assert SEEDS[name]
    for seed in SEEDS[name]:
        TARGETS[name](seed)


@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=200))
def test_any_bytes_hold(name: str, data: bytes) -> None:
    TARGETS[name](data)


@given(st.sampled_from(sorted(TARGETS)), st.data())
def test_seeds_with_a_piece_exchanged_hold(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[name]))
    at, piece = data.draw(st.integers(0, len(seed))), data.draw(st.binary(max_size=8))
    TARGETS[name](seed[:at] + piece + seed[at + data.draw(st.integers(0, 8)) :])


def test_what_does_not_hold_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "normalise_path", lambda text: text + "/")
    with pytest.raises(AssertionError):
        TARGETS["target"](b"a.example/b")
    monkeypatch.setattr(mcpcall, "_document", lambda body: {}[body])
    with pytest.raises(KeyError):
        TARGETS["mcp"](SEEDS["mcp"][0])
