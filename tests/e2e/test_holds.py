"""A hold keeps agents of a name, label, policy or image from every client, until somebody else releases it."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support import image
from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

OTHER = pwd.getpwnam("nobody")


@pytest.fixture(scope="module")
def built() -> image.Built:
    return image.Built([image.layer(image.programs())])


@pytest.fixture(scope="module")
def stockade(built: image.Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    place = tmp_path_factory.mktemp("image")
    built.layout(place / "layout")
    policy = f"kind: Policy\nname: image\nextends: default\nwiden: {{rootfs: ours}}\nrootfs: {place}/layout\n"
    group = grp.getgrgid(OTHER.pw_gid).gr_name
    with Instance.start(f'[control]\ngroup = "{group}"\n', policies={"image.yaml": policy}) as instance:
        yield instance


def as_other(stockade: Instance, *words: str) -> subprocess.CompletedProcess[str]:
    """The same command as another person, who is an operator."""
    return subprocess.run(
        [bin_dir() / "stockadectl", *words],
        env=stockade.environment,
        user=OTHER.pw_uid,
        group=OTHER.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("held", "launch"),
    [
        (["bad"], ["--name", "bad"]),
        (["--label", "team=red"], ["--label", "team=red"]),
        (["--policy", "python-agent"], ["--policy", "python-agent"]),
        (["--rootfs-digest", "DIGEST"], ["--policy", "image"]),
    ],
    ids=["name", "label", "policy", "image"],
)
def test_a_hold_outlives_restarts_and_only_somebody_else_ends_it(
    stockade: Instance, built: image.Built, held: list[str], launch: list[str]
) -> None:
    command = [*launch, "--", "sh", "-c", ":"]
    assert stockade.ctl("run", *command).code == 0, "the twin: nothing holds it yet"
    held = [built.digest if word == "DIGEST" else word for word in held]
    hold = stockade.json("hold", *held, "--reason", "it dials home", "--ticket", "INC-7")
    assert hold["ticket"] == "INC-7"
    stockade.down(signal.SIGKILL)
    stockade.up()
    refused = stockade.ctl("run", *command)
    assert (refused.code, "it dials home (INC-7)" in refused.err) == (125, True)
    theirs = as_other(stockade, "launch", *command)
    assert (theirs.returncode, "it dials home (INC-7)" in theirs.stderr) == (5, True)
    assert stockade.ctl("run", "--name", "good", "--", "sh", "-c", ":").code == 0, "others run"
    assert stockade.ctl("release", hold["hold_id"]).code == 4, "who made it, root or not, does not release it"
    assert as_other(stockade, "release", hold["hold_id"], "--reason", "seen to").returncode == 0
    assert stockade.ctl("run", *command).code == 0
