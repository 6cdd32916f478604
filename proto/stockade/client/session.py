"""A program's stdio over one call: the agent's own (Attach) or a further one's (Exec)."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from stockade.client import convert
from stockade.client.errors import from_rpc
from stockade.client.values import ExitStatus
from stockade.v1 import agents_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from stockade.client.methods import Method
    from stockade.client.values import Output

INPUT_BYTES_MAX: Final = 64 << 10
INPUTS_QUEUED_MAX: Final = 16
INPUT_POLL_SECONDS: Final = 0.2


class Session:
    """A program's stdio: iterate for its output; when the iteration is over, `status` says how it ended.

    write(), close_stdin(), resize() and send_signal() may be called from other threads and from signal handlers,
    except that write() waits while the program does not read.
    """

    def __init__(
        self, channel: grpc.Channel, target: str, method: Method[Any, Any], message: Callable[..., Any], start: object
    ) -> None:
        self.status = ExitStatus(None, None)
        self.stream_id = ""  # of an exec, once `started` is set: what kill_exec() takes
        self.started = threading.Event()
        self._target = target
        self._message = message
        # SimpleQueue.put may be interrupted by a signal handler that puts as well; Queue.put may not.
        self._inputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(INPUTS_QUEUED_MAX)
        self._over = False
        self._inputs.put(message(start=start))
        self._call: Any = channel.stream_stream(method.path, method.encode, method.decode)(self._sent())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the program; it runs on."""
        self._over = True
        self._inputs.put(None)
        self._call.cancel()

    def __iter__(self) -> Iterator[Output]:
        try:
            for answer in self._call:
                match answer.WhichOneof("output"):
                    case "chunk":
                        yield convert.output(answer.chunk)
                    case "exit":
                        self.status = convert.exit_status(answer.exit)
                    case _:
                        self.stream_id = getattr(answer.started, "stream_id", "")
                        self.started.set()
        except grpc.RpcError as error:
            raise from_rpc(error, self._target) from error
        finally:
            self._over = True
            self._inputs.put(None)

    def _sent(self) -> Iterator[Any]:
        while (item := self._inputs.get()) is not None:
            yield item
            if item.WhichOneof("input") == "stdin":
                self._room.release()

    def write(self, data: bytes) -> None:
        """Pass `data` on to its stdin; raises BrokenPipeError where it has ended."""
        for start in range(0, len(data), INPUT_BYTES_MAX):
            while not self._room.acquire(timeout=INPUT_POLL_SECONDS):
                if self._over:
                    break
            if self._over:
                raise BrokenPipeError("the program has ended")
            self._inputs.put(self._message(stdin=data[start : start + INPUT_BYTES_MAX]))

    def close_stdin(self) -> None:
        self._inputs.put(self._message(stdin_eof=True))

    def feed(self, data: bytes) -> None:
        """All of its stdin; what it does not want to read is dropped, as a closed pipe would."""
        try:
            self.write(data)
        except BrokenPipeError:
            return
        self.close_stdin()

    def resize(self, rows: int, cols: int) -> None:
        self._inputs.put(self._message(resize=agents_pb2.TerminalSize(rows=rows, cols=cols)))

    def send_signal(self, number: int) -> None:
        self._inputs.put(self._message(signal=number))
