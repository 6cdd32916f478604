"""Landlock's domain: what it must not break. Programs that `exec` starts later are in no domain, and of the same agent.

What it does stop is in tests/adversarial/test_filesystem.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox import syscalls

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

SERVER = """
import signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # one that comes before it is waited for stays pending
local = socket.socket(); local.bind(('127.0.0.1', 8080)); local.listen()
own = socket.socket(); own.connect(('127.0.0.1', 8080))
named = socket.socket(socket.AF_UNIX); named.bind('\\0sktest'); named.listen()
print('ready', flush=True)
named.accept()
signal.sigwait([signal.SIGUSR1])
print('signalled', flush=True)
signal.pause()  # what exec started ends with the agent, and is not done yet
"""
CLIENT = """
import os, signal, socket
socket.socket(socket.AF_UNIX).connect('\\0sktest')
def command(pid): return open(f'/proc/{pid}/cmdline', 'rb').read()
pid = next(entry for entry in os.listdir('/proc') if entry.isdigit() and b'signal.sigwait' in command(entry))
os.kill(int(pid), signal.SIGUSR1)
"""
# A ruleset that scopes signals (2) or abstract sockets (1), as Landlock's ABI 6 offers.
SCOPED = """
import ctypes, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
outside = socket.socket(socket.AF_UNIX); outside.bind('\\0sktest'); outside.listen()
if os.fork() == 0:
    ruleset = libc.syscall(444, struct.pack('=QQQ', 0, 0, 3), 24, 0)
    assert ruleset >= 0 and libc.syscall(446, ruleset, 0) == 0
    said = []
    try: os.kill(os.getppid(), 0)
    except PermissionError: said.append('signal')
    try: socket.socket(socket.AF_UNIX).connect('\\0sktest')
    except PermissionError: said.append('socket')
    print(*said, flush=True); os._exit(0)
os.wait()
"""


def test_what_exec_starts_reaches_the_agents_processes_and_local_servers_work(launcher: Launcher) -> None:
    agent = launcher.launch(["python3", "-c", SERVER])
    assert agent.posture["landlock_abi"] == syscalls.landlock_abi()
    while "ready" not in agent.stdout:
        assert launcher.exec(agent, ["/bin/true"])["status"]["code"] == 0
    done = launcher.exec(agent, ["python3", "-c", CLIENT])
    assert done["status"] == {"code": 0, "signal": None}, done["stderr"]
    while "signalled" not in agent.stdout:
        assert launcher.exec(agent, ["/bin/true"])["status"]["code"] == 0
    launcher.kill(agent)
    assert agent.stdout.split() == ["ready", "signalled"]


def test_with_scopes_it_would_not(launcher: Launcher) -> None:
    """Why there are none: two domains of one agent would refuse each other (landlock(7), ABI 6)."""
    told = launcher.run(["python3", "-c", SCOPED]).stdout.split()
    assert told == (["signal", "socket"] if syscalls.landlock_abi() >= 6 else [])
