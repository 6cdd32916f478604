"""run, exec and logs as real processes: bytes, terminals, signals and exit codes, as their caller sees them."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.scripted_api import Api

SECONDS_MAX = 30
ALL_BYTES = bytes(range(256)) * 1024


def command(*words: str) -> list[str]:
    return [sys.executable, "-I", "-m", "supervisord.ctl", *words]


def done(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*words), input=stdin, capture_output=True, check=False, timeout=SECONDS_MAX)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_output_is_the_programs_own_byte_for_byte(api: Api) -> None:
    ended = done("run", "--", "print")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"\x00\xffout\x1b[31m\n", b"err\xfe")
    assert not api.agents.launches[0].spec.stdin


def test_the_exit_code_is_the_programs_own(api: Api) -> None:
    assert [done("run", "--", "exit", code).returncode for code in ("0", "3", "69")] == [0, 3, 69]
    assert done("exec", "reader", "--", "exit", "4").returncode == 4
    assert done("exec", "nobody", "--", "exit", "4").returncode == 3
    del api


def test_stdin_goes_in_whole_and_its_end_too(api: Api) -> None:
    ended = done("run", "-i", "--", "cat", stdin=ALL_BYTES)
    assert (ended.returncode, ended.stdout == ALL_BYTES) == (0, True)
    assert api.agents.launches[0].spec.stdin
    ended = done("exec", "-i", "reader", "--", "cat", stdin=b"x\x00y")
    assert (ended.returncode, ended.stdout) == (0, b"x\x00y")


def test_a_connection_that_breaks_is_taken_up_where_it_was(api: Api) -> None:
    api.agents.drop_after = 4
    ended = done("run", "--", "count")
    assert (ended.returncode, ended.stdout) == (0, b"0123456789")
    assert [start.stdout_offset for start in api.agents.attaches] == [0, 4]


def test_signals_are_passed_on(api: Api) -> None:
    with subprocess.Popen(command("run", "--", "hang"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"signal 2\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"signal 15\n"
        assert process.wait(SECONDS_MAX) == 128 + 15
    assert api.agents.signals == [2, 15]
    assert not api.agents.killed.is_set()


def test_a_second_interrupt_kills(api: Api) -> None:
    with subprocess.Popen(command("run", "--", "hang"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"signal 2\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS_MAX) == 137
    assert list(api.agents.selectors[0].agents) == [api.agents.launches[0].agent_id]


def test_a_reader_that_goes_away_ends_the_agent(api: Api) -> None:
    with subprocess.Popen(command("run", "--", "flood"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.wait(SECONDS_MAX) == 141
    assert api.agents.killed.is_set()


def test_a_terminal_is_raw_resized_and_put_back(api: Api) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 33, 101, 0, 0))
    before = termios.tcgetattr(theirs)

    # The terminal has to be its controlling one: only then does a change of size reach it (setsid -c).
    process = subprocess.Popen(
        ["setsid", "-c", *command("run", "-i", "-t", "--", "hang")], stdin=theirs, stdout=theirs, stderr=theirs
    )
    try:
        seen = b""

        def read_until(text: bytes) -> None:
            nonlocal seen
            deadline = time.monotonic() + SECONDS_MAX
            while text not in seen:
                assert time.monotonic() < deadline, seen
                if select.select([ours], [], [], 0.1)[0]:
                    seen += os.read(ours, 4096)

        read_until(b"ready")
        assert (api.agents.launches[0].spec.tty.rows, api.agents.launches[0].spec.tty.cols) == (33, 101)
        until(lambda: not termios.tcgetattr(theirs)[3] & termios.ISIG)
        os.write(ours, b"\x03")  # a key for the agent's terminal, not an interrupt of ours
        read_until(b"<\x03>")
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 50, 120, 0, 0))
        until(lambda: (50, 120) in api.agents.sizes)
        process.terminate()
        assert process.wait(SECONDS_MAX) == 128 + 15
        assert termios.tcgetattr(theirs) == before
        assert api.agents.signals == [15]
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_logs_go_where_they_came_from_and_are_harmless_on_a_terminal(api: Api) -> None:
    ended = done("logs", "reader")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"out\x1b[31m\xff\n", b"err\n")
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            command("logs", "reader"), stdout=theirs, check=True, timeout=SECONDS_MAX, stderr=subprocess.DEVNULL
        )
        assert os.read(ours, 4096) == b"out\\x1b[31m\\xff\r\n"
        raw = command("logs", "--raw", "reader")
        subprocess.run(raw, stdout=theirs, check=True, timeout=SECONDS_MAX, stderr=subprocess.DEVNULL)
        assert os.read(ours, 4096) == b"out\x1b[31m\xff\r\n"
    finally:
        os.close(ours)
        os.close(theirs)
    del api


def test_output_of_a_log_is_exact_in_json_too(api: Api) -> None:
    first, second = (json.loads(line) for line in done("-o", "json", "logs", "reader").stdout.splitlines())
    assert base64.b64decode(first["bytes"]) == b"out\x1b[31m\xff\n"
    assert (second["data"], "bytes" in second) == ("err\n", False)
    del api


@pytest.mark.parametrize("words", [("status",), ("--help",), ("kill", "reader"), ("logs", "reader")])
def test_a_full_disk_below_our_output_is_said_and_a_failure(api: Api, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command(*words), stdout=full, stderr=subprocess.PIPE, check=False, timeout=SECONDS_MAX)
    assert ended.returncode == 1
    assert b"Traceback" not in ended.stderr
    del api


def test_an_agent_whose_output_cannot_be_written_is_killed(api: Api) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            command("run", "--", "print"), stdout=full, stderr=subprocess.PIPE, check=False, timeout=SECONDS_MAX
        )
    assert (ended.returncode, b"No space left" in ended.stderr) == (125, True)
    assert api.agents.killed.is_set()


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_descriptor_that_was_closed_is_nobody_elses(api: Api, closed: int) -> None:
    script = f'exec "$0" "$@" {closed}>&-'
    ended = subprocess.run(
        ["sh", "-c", script, *command("run", "--", "print")], capture_output=True, check=False, timeout=SECONDS_MAX
    )
    assert ended.returncode == 0
    assert (ended.stdout, ended.stderr) == (
        b"" if closed == 1 else b"\x00\xffout\x1b[31m\n",
        b"" if closed == 2 else b"err\xfe",
    )
    assert not api.agents.killed.is_set()


def test_what_is_printed_does_not_hang_on_the_locale(api: Api) -> None:
    for words in (("--help",), ("log", "checkpoint")):
        usual = done(*words)
        ascii_only = subprocess.run(
            command(*words)[:1] + command(*words)[2:], capture_output=True, check=False, timeout=SECONDS_MAX,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert (ascii_only.returncode, ascii_only.stdout) == (usual.returncode, usual.stdout)
        assert any(byte > 0x7F for byte in usual.stdout)
    del api


def test_the_shell_keeps_to_the_form_it_was_started_with(api: Api) -> None:
    assert done("-o", "json", "shell", stdin=b"status\n").stdout.startswith(b"[")
    assert done("shell", stdin=b"status\n").stdout.startswith(b"NAME")
    del api


def test_the_shell_runs_line_by_line(api: Api) -> None:
    ended = done("shell", stdin=b"grants # unknown here\nkill reader -o json\nnonsense\nquit\n")
    assert b'"receipt_id"' in ended.stdout
    assert b"there is no verb 'nonsense'" in ended.stderr
    assert ended.returncode == 2
    assert api.agents.killed.is_set()


def test_only_what_a_run_needs_is_imported() -> None:
    names = "import sys, supervisord.ctl.command, supervisord.ctl.inside, stockade.client.sync; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-I", "-c", names], capture_output=True, text=True, check=True).stdout
    loaded = set(out.split())
    heavy = {"yaml", "jsonschema", "structlog", "cryptography", "pyroute2", "uvloop", "psutil", "h11", "grpc_status"}
    assert loaded & heavy == set()
    assert not any(name.startswith(("sandbox", "gateway_client")) for name in loaded)
    of_the_daemon = {name for name in loaded if name.startswith("supervisord.")} - {"supervisord.ctl"}
    assert all(name.startswith("supervisord.ctl.") for name in of_the_daemon)


def test_a_deferred_module_comes_when_it_is_used() -> None:
    program = """
        import sys
        from supervisord.ctl.deferred import defer
        defer("asyncio", "grpc.aio")
        import grpc, stockade.client.sync, supervisord.ctl.inside
        assert "ssl" not in sys.modules and "asyncio.events" not in sys.modules
        import asyncio
        async def act(): return grpc.aio.insecure_channel("unix:/nonexistent")
        print(type(asyncio.run(act())).__module__, sys.modules["asyncio"].__file__ is not None)
    """
    told = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert told.stdout == "grpc.aio._channel True\n"
