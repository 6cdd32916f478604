"""Verbs that carry a program's bytes: run, exec, logs. What the program writes goes out as it is."""

from __future__ import annotations

import base64
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from stockade.client.errors import Unreachable
from stockade.client.values import Selector

from supervisord.ctl.agents import show_plan
from supervisord.ctl.command import OK, PIPE_CLOSED, Usage
from supervisord.ctl.launching import environment, launch_options, terminal_size
from supervisord.ctl.output import complain, escape_lines, print_json
from supervisord.ctl.verbs import STOCKADE_FAILED

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator
    from types import FrameType

    from stockade.client.session import Session
    from stockade.client.sync import Agent, Stockade
    from stockade.client.values import ExitStatus, Output

STDIN, STDOUT, STDERR = 0, 1, 2
READ_BYTES: Final = 64 << 10
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RECONNECT_SECONDS_MAX: Final = 30.0
RECONNECT_PAUSE_SECONDS: Final = 0.5


def run(stockade: Stockade, options: Namespace) -> int:
    if not options.command:
        raise Usage("there is nothing to run: give a command after --", "stockadectl run --help")
    wanted = launch_options(options)
    if options.dry_run:
        return show_plan(stockade.plan(options.command, **wanted), options)
    # Chosen here, so that an interrupt during the launch still knows whom to kill.
    agent_id = wanted["agent_id"] = "ag_" + base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()
    signals = Signals(lambda: stockade.kill_all(Selector(agents=(agent_id,)), "interrupted twice"))
    with signals.forwarded():
        agent = stockade.launch(options.command, **wanted)
        try:
            status = _attached(agent, options, signals)
        except BrokenPipeError:
            # A program in a pipe dies of this; so does the agent, which would otherwise write on for nobody.
            agent.kill("the reader of its output has gone")
            return PIPE_CLOSED
        except OSError as error:
            agent.kill("its output cannot be written")
            complain(f"stockadectl: cannot write what {agent.name} prints: {error.strerror}")
            return STOCKADE_FAILED
    code = status.shell_code
    if code is None:
        complain(f"stockadectl: cannot run {agent.name}: {agent.refresh().info.failure or 'it ended without a status'}")
        return STOCKADE_FAILED
    return code


def _attached(agent: Agent, options: Namespace, signals: Signals) -> ExitStatus:
    """Stream until the agent has ended. It outlives a restart of the daemon, and so does this where nothing is lost."""
    seen = {"stdout": 0, "stderr": 0}
    lost_at = 0.0
    while True:
        try:
            with agent.attach(stdout_offset=seen["stdout"], stderr_offset=seen["stderr"]) as session:
                for output in _streamed(session, options, signals):
                    seen[output.stream] = output.offset + len(output.data)
                    lost_at = 0.0
                return session.status
        except Unreachable:
            # Input that was on its way is gone, so only a program without input can be picked up again.
            lost_at = lost_at or time.monotonic()
            if options.interactive or time.monotonic() - lost_at > RECONNECT_SECONDS_MAX:
                complain(f"stockadectl: the agent is not affected: see `stockadectl logs -f {agent.name}` later")
                raise
            time.sleep(RECONNECT_PAUSE_SECONDS)


def execute(stockade: Stockade, options: Namespace) -> int:
    if not options.command:
        raise Usage("there is nothing to execute: give a command after --", "stockadectl exec --help")
    agent = stockade.agent(options.subject)
    size = terminal_size() if options.terminal else None
    env = environment(options.env)
    signals = Signals(None)
    with (
        signals.forwarded(),
        agent.open(options.command, env=env, cwd=options.cwd, terminal=size, stdin=options.interactive) as session,
    ):
        if options.show_stream:
            threading.Thread(target=_show_stream, args=(session,), daemon=True).start()
        for _ in _streamed(session, options, signals):
            pass
        code = session.status.shell_code
    return STOCKADE_FAILED if code is None else code


def _show_stream(session: Session) -> None:
    session.started.wait()
    complain(f"stream {session.stream_id}")


def logs(stockade: Stockade, options: Namespace) -> int:
    escaped = sys.stdout.isatty() and not options.raw
    for output in stockade.agent(options.subject).logs(follow=options.follow):
        if options.output == "json":
            data = output.data.decode("utf-8", "replace")
            document: dict[str, object] = {"stream": output.stream, "offset": output.offset, "data": data}
            if data.encode() != output.data:  # no text, or cut within a character
                document["bytes"] = output.data
            print_json(document)
        else:
            shown = escape_lines(output.data).encode() if escaped else output.data
            write_all(STDERR if output.stream == "stderr" else STDOUT, shown)
    return OK


def _streamed(session: Session, options: Namespace, signals: Signals) -> Iterator[Output]:
    """Each piece of output after it was written to our own stdout or stderr; stdin and signals go the other way."""
    raw = options.terminal and options.interactive and os.isatty(STDIN)
    with signals.to(session), raw_terminal(session, resize=options.terminal, raw=raw):
        if options.interactive:
            threading.Thread(target=pump_stdin, args=(session,), daemon=True).start()
        for output in session:
            write_all(STDERR if output.stream == "stderr" else STDOUT, output.data)
            yield output


def pump_stdin(session: Session) -> None:
    """Pass our stdin on until it ends or the program has."""
    try:
        while data := os.read(STDIN, READ_BYTES):
            session.write(data)
        session.close_stdin()
    except (BrokenPipeError, OSError):
        return


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made the terminal we share non-blocking
            select.select([], [descriptor], [])


@contextmanager
def raw_terminal(session: Session, *, resize: bool, raw: bool) -> Iterator[None]:
    """Our terminal without a mind of its own, where `raw`; changes of its size are passed on, where `resize`."""

    def resized(_number: int, _frame: FrameType | None) -> None:
        session.resize(*terminal_size())

    before: Any = termios.tcgetattr(STDIN) if raw else None
    handler = signal.signal(signal.SIGWINCH, resized) if resize else None
    try:
        if raw:
            tty.setraw(STDIN, termios.TCSADRAIN)  # what was typed ahead stays
        yield
    finally:
        if resize:
            signal.signal(signal.SIGWINCH, handler)
        if raw:
            termios.tcsetattr(STDIN, termios.TCSADRAIN, before)


class Signals:
    """Passes the signals that would end us on to the program; a second SIGINT calls `kill` instead.

    What comes before there is a session waits for it.
    """

    def __init__(self, kill: Callable[[], object] | None) -> None:
        self._kill = kill
        self._waiting: list[int] = []
        self._session: Session | None = None
        self._interrupts = 0

    @contextmanager
    def forwarded(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._came) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def to(self, session: Session) -> Iterator[None]:
        self._session = session
        for number in self._waiting:
            session.send_signal(number)
        self._waiting.clear()
        try:
            yield
        finally:
            self._session = None

    def _came(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and number == signal.SIGINT and self._kill is not None:
            # Not here: this may have interrupted gRPC at a moment when it holds a lock.
            threading.Thread(target=self._kill, daemon=True).start()
        elif self._session is None:
            self._waiting.append(number)
        else:
            self._session.send_signal(number)
