"""A real LiteLLM proxy process (.venv-litellm) without a database, its upstream the scripted model over TCP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REPOSITORY = Path(__file__).resolve().parents[2]
LITELLM = REPOSITORY / ".venv-litellm" / "bin" / "litellm"
MASTER_KEY = "sk-sktest-master"
START_SECONDS_MAX = 90
MODEL = "scripted-openai"
MODEL_OF_MESSAGES = "scripted-anthropic"


@dataclass(frozen=True, slots=True)
class Proxy:
    url: str
    key: str
    log: Path

    def logged(self) -> list[dict[str, object]]:
        """Return what the proxy noted of each finished call: customer, tags, cost."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


def config(upstream: str, also: Mapping[str, str]) -> dict[str, object]:
    """Return a proxy configuration; JSON is YAML. `also` names further models: of "openai" or "anthropic"."""
    bases = {"openai": f"{upstream}/v1", "anthropic": upstream}
    priced = {"input_cost_per_token": 0.001, "output_cost_per_token": 0.002}
    return {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": "openai/scripted", "api_base": f"{upstream}/v1", "api_key": "sk-upstream"},
                "model_info": priced,
            },
            {
                "model_name": MODEL_OF_MESSAGES,
                "litellm_params": {"model": "anthropic/scripted", "api_base": upstream, "api_key": "sk-upstream"},
                "model_info": priced,
            },
            *(
                {
                    "model_name": name,
                    "litellm_params": {"model": f"{kind}/{name}", "api_base": bases[kind], "api_key": "sk-upstream"},
                    "model_info": priced,
                }
                for name, kind in also.items()
            ),
        ],
        "general_settings": {"master_key": MASTER_KEY},
        "litellm_settings": {
            "callbacks": ["recorder.recorder"],
            "include_cost_in_streaming_usage": True,
            "telemetry": False,
            "num_retries": 0,
        },
    }


# Loaded by the proxy: what LiteLLM itself believes of a call, seen from inside it.
RECORDER = """
import json, os
from litellm.integrations.custom_logger import CustomLogger

class Recorder(CustomLogger):
    def _note(self, kwargs):
        noted = kwargs.get("standard_logging_object") or {}
        line = {"end_user": noted.get("end_user"), "tags": noted.get("request_tags"),
                "cost": noted.get("response_cost"), "status": noted.get("status"),
                "api_base": noted.get("api_base"), "model": noted.get("model_group"),
                "session": noted.get("trace_id")}
        with open(os.environ["SKTEST_RECORD"], "a") as file:
            file.write(json.dumps(line) + chr(10))

    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        self._note(kwargs)

    async def async_log_failure_event(self, kwargs, response_obj, start_time, end_time):
        self._note(kwargs)

recorder = Recorder()
"""


@contextlib.contextmanager
def litellm_proxy(upstream: str, also: Mapping[str, str] | None = None) -> Iterator[Proxy]:
    """Run the proxy; it and its files are gone at the end."""
    if not LITELLM.exists():
        raise FileNotFoundError(f"{LITELLM} is missing: run ./bootstrap test (tests/e2e/requirements-litellm.txt)")
    directory = Path(tempfile.mkdtemp(prefix="sktest-litellm-"))
    (directory / "config.yaml").write_text(json.dumps(config(upstream, also or {})))
    (directory / "recorder.py").write_text(RECORDER)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "NO_PROXY": "*",
        "SKTEST_RECORD": str(directory / "calls.jsonl"),
    }
    output = (directory / "output").open("wb")
    process = subprocess.Popen(
        [LITELLM, "--config", directory / "config.yaml", "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        cwd=directory,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    proxy = Proxy(f"http://127.0.0.1:{port}", MASTER_KEY, directory / "calls.jsonl")
    try:
        _wait_until_alive(proxy, process, directory / "output")
        yield proxy
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.close()
        shutil.rmtree(directory)


def _wait_until_alive(proxy: Proxy, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{proxy.url}/health/liveliness", timeout=2):  # noqa: S310 - our own loopback URL
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"cannot start LiteLLM: {output.read_text(errors='replace')[-3000:]}")
