"""The table of controls: who may decide on what, and what a missing one leads to."""

from __future__ import annotations

import pytest

from sandbox.controls import BY_NAME, CONTROLS, NEGOTIABLE, Absence, Demanded, degraded


def test_names_are_unique_and_everything_a_launch_can_lack_has_a_remedy() -> None:
    assert len(BY_NAME) == len(CONTROLS)
    assert all(control.remedy and control.protects for control in CONTROLS if control.absence is not Absence.TOLD)
    assert set(NEGOTIABLE) == {"swap", "io", "idmap", "landlock", "nftables", "workspace-quota", "disk-quota"}


@pytest.mark.parametrize("name", NEGOTIABLE)
def test_what_is_required_is_required_whatever_else_is_said(name: str) -> None:
    with pytest.raises(Demanded, match=f"this host lacks {name}: it shows") as caught:
        degraded({name: "it shows"}, require=(name,), degraded_ok=(name,))
    assert f"take `require: [{name}]`" in caught.value.remedy
    assert BY_NAME[name].remedy in caught.value.remedy
    assert degraded({}, require=(name,), degraded_ok=()) == []


@pytest.mark.parametrize("name", NEGOTIABLE)
def test_what_may_be_missing_is_shown(name: str) -> None:
    assert degraded({name: "so"}, require=(), degraded_ok=(name,)) == [f"{name}: so"]


def test_without_a_word_the_table_decides() -> None:
    assert degraded({"landlock": "none"}, require=("idmap",), degraded_ok=()) == ["landlock: none"]
    for name in ("idmap", "swap"):
        with pytest.raises(Demanded) as caught:
            degraded({name: "none"}, require=(), degraded_ok=())
        assert f"`degraded_ok: [{name}]`" in caught.value.remedy


def test_what_everything_stands_on_is_never_done_without() -> None:
    with pytest.raises(Demanded):
        degraded({"seccomp": "none"}, require=(), degraded_ok=("seccomp",))
