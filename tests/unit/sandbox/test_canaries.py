"""The canaries' own workings, without a sandbox: what came through, could not be tried or kept silent is a finding."""

from __future__ import annotations

import os
import signal

import pytest

from sandbox import canaries
from sandbox.plan import AGENT_ID_FIRST, IdRange, SandboxPlan
from sandbox.sync import StepError

PLAN = SandboxPlan("ag_x", "t", "host", ("/bin/true",), (), IdRange(AGENT_ID_FIRST))


def attempts(monkeypatch: pytest.MonkeyPatch, **made: canaries.Attempt) -> None:
    monkeypatch.setattr(canaries, "ATTEMPTS", made)


def broken(_plan: SandboxPlan) -> str:
    raise ValueError("nonsense")


def dies(_plan: SandboxPlan) -> str:
    os._exit(3)


def hangs(_plan: SandboxPlan) -> str:
    os.kill(os.getpid(), signal.SIGALRM)
    return ""


def test_all_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts(monkeypatch, one=lambda _: "", two=lambda _: "")
    assert canaries.run(PLAN)["attempts"] == 2


def test_what_came_through_and_what_could_not_be_tried_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts(monkeypatch, one=lambda _: "", two=lambda _: "it opens", three=broken)
    with pytest.raises(StepError, match="two: it opens; three: could not be tried: ValueError: nonsense"):
        canaries.run(PLAN)


def test_many_findings_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts(monkeypatch, **{f"a{number}": lambda _: "yes" for number in range(20)})
    with pytest.raises(StepError, match="a7: yes; and 12 more"):
        canaries.run(PLAN)


@pytest.mark.parametrize(("attempt", "end"), [(dies, "with 3"), (hangs, f"with -{int(signal.SIGALRM)}")])
def test_silence_is_a_finding(monkeypatch: pytest.MonkeyPatch, attempt: canaries.Attempt, end: str) -> None:
    attempts(monkeypatch, one=lambda _: "", two=attempt)
    with pytest.raises(StepError, match=f"ended without a word, {end}"):
        canaries.run(PLAN)


def test_the_digest_is_of_the_set() -> None:
    assert canaries.digest() == canaries.digest()
    assert len(canaries.digest()) == 71
