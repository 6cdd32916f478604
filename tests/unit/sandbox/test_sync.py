"""What a child asks of the channel to whoever started it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import socket, sys
from sandbox import sync
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
if sys.argv[1] == "gone": theirs.close()
sync.end_if_alone(ours)
print("goes on")
"""


@pytest.mark.parametrize(("other_end", "code", "said"), [("there", 0, "goes on\n"), ("gone", 1, "")])
def test_a_child_whose_launcher_went_before_it_could_ask_for_a_signal_ends(
    other_end: str, code: int, said: str
) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, other_end], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, said), done.stderr
