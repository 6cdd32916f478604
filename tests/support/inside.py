"""A program inside a sandbox that does what a test asks it, again and again, in one process that keeps what it opened.

inside = Inside(launcher)
inside.ask("held = os.open('/data', os.O_PATH)")
assert inside.ask("os.listdir('/data')") == ["note"]
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.launcher import Agent, Launcher

PROGRAM = """
import ctypes, errno, json, mmap, os, shutil, signal, socket, stat, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
names = globals()
for line in sys.stdin:
    code = json.loads(line)
    try:
        try: answer = eval(compile(code, 'ask', 'eval'), names)
        except SyntaxError:
            exec(compile(code, 'ask', 'exec'), names); answer = None
        said = {'value': answer}
    except OSError as e: said = {'errno': errno.errorcode.get(e.errno, str(e.errno))}
    except BaseException as e: said = {'failure': repr(e)}
    print(json.dumps(said, default=str), flush=True)
time.sleep(1000)  # its input went with the launcher
"""
ANSWER_SECONDS_MAX = 10.0


class Refused(Exception):  # noqa: N818 - what the kernel did
    """The kernel said no; `.errno` is its word."""

    def __init__(self, errno: str) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass
class Inside:
    launcher: Launcher
    agent: Agent
    asked: int = 0

    @classmethod
    def start(cls, launcher: Launcher, **plan: Any) -> Inside:
        fds = plan.pop("fds", [])
        return cls(launcher, launcher.launch(["python3", "-I", "-c", PROGRAM], fds, stdin=True, **plan))

    def tell(self, code: str) -> None:
        """Have something done without waiting for it."""
        line = json.dumps(code) + "\n"
        data = base64.b64encode(line.encode()).decode()
        self.launcher.request("stdin", agent_id=self.agent.agent_id, data=data, eof=False)
        self.asked += 1

    def ask(self, code: str) -> Any:
        """The value of an expression, or None for statements; raises `Refused` for an `OSError` inside."""
        self.tell(code)
        return self.answer()

    def answer(self) -> Any:
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while len(lines := self.agent.stdout.splitlines()) < self.asked:
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer; stderr: {self.agent.stderr[-2000:]}")
            time.sleep(0.002)
        said = json.loads(lines[self.asked - 1])
        if "errno" in said:
            raise Refused(said["errno"])
        if "failure" in said:
            raise AssertionError(said["failure"])
        return said["value"]

    def refuses(self, code: str) -> str:
        """The errno with which the kernel refuses this; empty where it does not."""
        try:
            self.ask(code)
        except Refused as refused:
            return refused.errno
        return ""
