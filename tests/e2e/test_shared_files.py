"""What agents see of the host's files is no way to programs of the host, nor to each other."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import OWNER, Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

OPEN = """
kind: Policy
name: open
version: 1
extends: default
widen: {allow_sockets: a test, shared_workspace: a test}
allow_sockets: true
shared_workspace: true
"""
CONNECT = "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/workspace/svc.sock')\""


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start(policies={"open.yaml": OPEN}) as instance:
        yield instance


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_a_socket_of_a_host_program_is_not_shown(
    stockade: Instance, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = stockade.workspace(note="x")
    monkeypatch.chdir(workspace)
    flags = ("--workspace", f"{workspace}:{mode}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("svc.sock")
        os.chown("svc.sock", OWNER, OWNER)
        server.listen()
        done = stockade.run(CONNECT, *flags)
        assert done.code == 125
        assert "svc.sock" in done.err
        # Where the policy allows it, it is a way: that is what the refusal is for.
        assert stockade.run(CONNECT, *flags, "--policy", "open").code == 0
    (workspace / "svc.sock").unlink()
    assert stockade.run("cat note", *flags).out == "x"


def test_two_agents_share_no_tree_that_one_can_write_to(stockade: Instance) -> None:
    workspace = stockade.workspace(note="x")
    stockade.launch("--name", "first", "--workspace", f"{workspace}:rw", "--", "sleep", "1000")
    done = stockade.run("true", "--workspace", f"{workspace}:ro")
    assert done.code == 125
    assert "first" in done.err
    assert stockade.run("true", "--workspace", f"{workspace}:ro", "--policy", "open").code == 0
    stockade.ctl("kill", "first")
    assert stockade.run("cat note", "--workspace", f"{workspace}:ro").out == "x"
