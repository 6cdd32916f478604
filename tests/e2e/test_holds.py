"""A hold keeps agents of a name, label, policy or image from every client, until somebody else releases it."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import image
from tests.support.census import launcher_pid
from tests.support.instance import Instance, bin_dir
from tests.support.people import BERT, by

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


@pytest.fixture(scope="module")
def built() -> image.Built:
    return image.Built([image.layer(image.programs())])


@pytest.fixture(scope="module")
def stockade(built: image.Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    place = tmp_path_factory.mktemp("image")
    built.layout(place / "layout")
    policy = f"kind: Policy\nname: image\nextends: default\nwiden: {{rootfs: ours}}\nrootfs: {place}/layout\n"
    with Instance.start(policies={"image.yaml": policy}) as instance:
        yield instance


def test_a_hold_outlives_restarts_and_only_somebody_else_ends_it(stockade: Instance, built: image.Built) -> None:
    held = [
        (["bad"], ["--name", "bad"]),
        (["--label", "team=red"], ["--label", "team=red"]),
        (["--policy", "python-agent"], ["--policy", "python-agent"]),
        (["--rootfs-digest", built.digest], ["--policy", "image"]),
    ]
    command = ["--", "sh", "-c", ":"]
    holds = []
    for target, launch in held:
        assert stockade.ctl("run", *launch, *command).code == 0, "the twin: nothing holds it yet"
        hold = stockade.json("hold", *target, "--reason", "it dials home", "--ticket", "INC-7")
        assert hold["ticket"] == "INC-7"
        holds.append(hold["hold_id"])
    stockade.down(signal.SIGKILL)
    stockade.up()
    for (_, launch), hold_id in zip(held, holds, strict=True):
        refused = stockade.ctl("run", *launch, *command)
        assert (refused.code, "it dials home (INC-7)" in refused.err) == (125, True), launch
        theirs = by(stockade, BERT, "launch", *launch, *command)
        assert (theirs.code, "it dials home (INC-7)" in theirs.err) == (5, True), launch
        assert stockade.ctl("run", "--name", "good", *command).code == 0, "others run"
        assert stockade.ctl("release", hold_id).code == 4, "who made it, root or not, does not release it"
        assert by(stockade, BERT, "release", hold_id, "--reason", "seen to").code == 0
        assert stockade.ctl("run", *launch, *command).code == 0, launch


def test_a_launch_that_is_under_way_when_a_hold_comes_runs_nothing(stockade: Instance, tmp_path: Path) -> None:
    """Its own check is behind it: the launcher is stopped while it builds."""
    launcher = launcher_pid(stockade)
    ran = tmp_path / "ran"
    command = [str(bin_dir() / "stockadectl"), "run", "--name", "racing", "--", "sh", "-c", "echo ran"]
    os.kill(launcher, signal.SIGSTOP)
    try:
        with ran.open("wb") as output:
            launch = subprocess.Popen(command, env=stockade.environment, stdout=output, stderr=subprocess.STDOUT)
        stockade.wait(lambda: "echo ran" in stockade.ctl("actions", "--verb", "agent.launch").out)
        hold = stockade.json("hold", "racing", "--reason", "too late for its check")
    finally:
        os.kill(launcher, signal.SIGCONT)
    assert launch.wait(30) == 125
    assert "too late for its check" in ran.read_text()
    assert "agent.exec" not in [e["verb"] for e in stockade.ctl("-o", "json", "actions", "racing").lines()]
    assert by(stockade, BERT, "release", hold["hold_id"]).code == 0
    assert stockade.ctl("run", "--name", "racing", "--", "sh", "-c", ":").code == 0


def test_only_a_digest_of_an_image_can_be_held(stockade: Instance) -> None:
    for wrong in ("sha256:abc", "sha1:" + "0" * 40, "", "sha256:" + "G" * 64):
        assert stockade.ctl("hold", "--rootfs-digest", wrong).code == 2
