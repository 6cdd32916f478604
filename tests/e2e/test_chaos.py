"""The judge of `./bootstrap chaos`: some points pass, and what is not as promised is found."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import rounds
from tests.chaos.points import Deed, Point, Victim
from tests.chaos.rounds import Answered, Round, Wrong
from tests.support.census import directories

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")
POINTS = 12


@pytest.mark.timeout(300)
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_some_points_pass_and_a_run_goes_on_where_it_was_stopped(jobs: str) -> None:
    seed = random.SystemRandom().getrandbits(32)
    words = ["--seed", str(seed), "--points", "110", "--from", str(111 - POINTS), "--jobs", jobs]
    done = subprocess.run(
        [sys.executable, "tests/chaos/run.py", *words],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {seed}, points {111 - POINTS} to 110" in done.stdout
    assert f"after {POINTS} deaths" in done.stdout


@pytest.mark.timeout(300)
def test_what_was_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Point(1, Deed.GRANT, Victim.DAEMON, 0.05)
    with Round.begin() as current:
        current.come_to(here)
        for lie, said in (
            (Answered(launched=["ag_lost"]), "launched, as its caller was told"),
            (Answered(granted=["gr_lost"]), "granted, as the caller was told"),
            (Answered(revoked=["gr_lost"]), "revoked, and in force again"),
        ):
            with pytest.raises(Wrong, match=said):
                current._judge(here, lie)
        current._site.seen.append("GET /smuggled")
        with pytest.raises(Wrong, match="left, and no entry says so"):
            current._judge(here, Answered())
        current._site.seen.remove("GET /smuggled")
        current._launched.clear()
        with pytest.raises(Wrong, match="no entry says that it was launched"):
            current._judge(here, Answered())
        monkeypatch.setattr(rounds, "BACK_SECONDS_MAX", 1.0)
        left = next(directories(current._stockade.name)).parent / "left"
        left.mkdir()
        with pytest.raises(Wrong, match="nothing is left behind"):
            current._clear(Point(2, Deed.LAUNCH, Victim.DAEMON, 0))
        left.rmdir()
        current._clear(Point(2, Deed.LAUNCH, Victim.DAEMON, 0))
