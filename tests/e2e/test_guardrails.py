"""Guardrails in the real embedded gateway and the whole of Stockade: what an agent gets, and what is recorded."""

from __future__ import annotations

import http.client
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import EmbeddedGateway, Shim, run_conformance, scripted_upstream
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "ghp_" + "aB3" * 12
MAIL = "bob@example.com"
PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
RULES = [
    {"name": "no-secrets", "direction": "both", "action": "block", "patterns": ["secrets"], "own": {}, "models": ["*"]},
    {"name": "no-pii", "direction": "both", "action": "mask", "patterns": ["email", "card"],
     "own": {"badge": r"BADGE-\d{6}"}, "models": ["guarded*", "relayed"]},
]  # fmt: skip
# The scripted model puts its own words together, so that the question need not hold what the answer does.
SCRIPT = {
    "rules": [
        {"when": {"user": "leak"}, "say": f"The key is {SECRET}, keep it.", "chunk_chars": 3},
        {"when": {"user": "mail"}, "say": f"Write to {MAIL} or BADGE-123456.", "chunk_chars": 3},
        {"when": {"user": "tool"}, "chunk_chars": 3,
         "call": [{"name": "send", "arguments": {"to": MAIL, "card": 4111111111111111}}]},
    ]
}  # fmt: skip
TOLD: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shim]:
    """A gateway with rules: a scripted model, and the same behind a provider's API that is relayed."""
    script = tmp_path_factory.mktemp("guardrails") / "script.json"
    script.write_text(json.dumps(SCRIPT))
    with scripted_upstream("--script", str(script)) as upstream:
        models = [
            {"name": "guarded", "kind": "scripted", "script": "s"},
            {"name": "relayed", "kind": "openai", "url": f"{upstream}/v1"},
            {"name": "guarded-plain", "kind": "scripted"},
            {"name": "free", "kind": "scripted", "script": "s"},
        ]
        with EmbeddedGateway(models=models, scripted={"s": SCRIPT}, guardrails=RULES) as gateway:
            assert gateway.ready["ready"], gateway.ready

            def listen() -> None:
                gateway.life_line.settimeout(None)
                data = b""
                while piece := gateway.life_line.recv(65536):
                    data += piece
                    *lines, data = data.split(b"\n")
                    TOLD.extend(json.loads(line)["guardrail"] for line in lines)

            threading.Thread(target=listen, daemon=True).start()
            with Shim(gateway) as running:
                yield running


def post(shim: Shim, path: str, model: str, prompt: str, *, stream: bool, **more: Any) -> tuple[int, str]:
    body: dict[str, Any] = {"model": model, "stream": stream, **more}
    if path == "/v1/responses":
        body["input"] = prompt
    else:
        body["messages"] = [{"role": "user", "content": prompt}]
        body["max_tokens"] = 500
    connection = http.client.HTTPConnection(shim.url.removeprefix("http://"), timeout=10)
    connection.request("POST", path, json.dumps(body))
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def said(text: str) -> str:
    """Return the words of a streamed answer, put together as a client does."""
    words = ""
    for line in text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            match event:
                case {"choices": [{"delta": dict(delta)}]}:
                    words += delta.get("content") or ""
                    words += "".join(call["function"]["arguments"] for call in delta.get("tool_calls", ()))
                case {"type": "response.output_text.delta" | "response.function_call_arguments.delta"}:
                    words += event["delta"]
                case {"delta": {"text": piece}} | {"delta": {"partial_json": piece}}:
                    words += piece
                case _:
                    pass
    return words


@pytest.mark.parametrize("model", ["guarded", "relayed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_masked_answers_say_everything_else(shim: Shim, path: str, model: str, stream: bool) -> None:  # noqa: FBT001
    status, text = post(shim, path, model, "mail, please", stream=stream)
    assert status == 200, text
    assert MAIL not in text
    assert "BADGE-1" not in text
    if stream:
        assert said(text) == "Write to [masked:email] or [masked:badge]."
        assert text.rstrip().endswith(("[DONE]", "}")), "the stream has its end"
    else:
        assert "Write to [masked:email] or [masked:badge]." in text


@pytest.mark.parametrize("path", PATHS)
def test_arguments_of_tools_are_masked_and_stay_json(shim: Shim, path: str) -> None:
    schema = {"type": "object", "properties": {"to": {"type": "string"}}}
    tool: dict[str, Any] = {"name": "send", "description": "", "parameters": schema}
    if path == "/v1/chat/completions":
        tool = {"type": "function", "function": tool}
    elif path == "/v1/messages":
        tool = {"name": "send", "input_schema": schema}
    else:
        tool["type"] = "function"
    status, text = post(shim, path, "guarded", "use the tool", stream=True, tools=[tool])
    assert status == 200
    assert json.loads(said(text)) == {"to": "[masked:email]", "card": 10**15}
    _, whole = post(shim, path, "guarded", "use the tool", stream=False, tools=[tool])
    assert "[masked:email]" in whole
    assert MAIL not in text + whole
    assert "4111111111111111" not in text + whole


@pytest.mark.parametrize("model", ["guarded", "relayed"])
@pytest.mark.parametrize("path", PATHS)
def test_blocked_answers_are_an_error_of_the_dialect(shim: Shim, path: str, model: str) -> None:
    status, text = post(shim, path, model, "leak it", stream=False)
    assert status == 400
    value = json.loads(text)
    assert "guardrail_blocked" in value["error"]["message"]
    assert value["usage"], "what it used is charged all the same"
    assert (value.get("type") == "error") is (path == "/v1/messages")
    assert path == "/v1/messages" or value["error"]["code"] == "guardrail_blocked"
    status, streamed = post(shim, path, model, "leak it", stream=True)
    assert status == 200, "its head had left before the words came"
    last = json.loads([line for line in streamed.splitlines() if line.startswith("data: ")][-1].removeprefix("data: "))
    assert "guardrail_blocked" in json.dumps(last)
    assert said(streamed) in ("The key is ", "The key is")
    for start in (SECRET[:12], SECRET):
        assert start not in text + streamed


def all_told() -> int:
    """How many verdicts were told, once no more come."""
    count, since = len(TOLD), time.monotonic()
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        if len(TOLD) != count:
            count, since = len(TOLD), time.monotonic()
    return count


@pytest.mark.parametrize("path", PATHS)
def test_blocked_and_masked_questions(shim: Shim, path: str) -> None:
    status, text = post(shim, path, "guarded", f"what is {SECRET}?", stream=True)
    assert status == 400
    assert "guardrail_blocked" in text
    assert SECRET not in text
    status, text = post(shim, path, "guarded-plain", f"echo {MAIL}", stream=False)
    assert status == 200
    assert "echo [masked:email]" in text


def test_a_model_no_rule_names_is_left_alone_and_each_verdict_is_told(shim: Shim) -> None:
    _, text = post(shim, PATHS[0], "free", "mail, please", stream=True)
    assert said(text) == f"Write to {MAIL} or BADGE-123456."
    before = all_told()  # of the tests before: a verdict may be told after its answer
    post(shim, PATHS[0], "guarded", f"mail {MAIL}", stream=True)
    post(shim, PATHS[0], "guarded", "leak it", stream=True)
    all_told()
    told = [{key: each[key] for key in ("direction", "action", "rules", "patterns")} for each in TOLD[before:]]
    assert told == [
        {"direction": "request", "action": "mask", "rules": ["no-pii"], "patterns": {"email": 1}},
        {"direction": "response", "action": "mask", "rules": ["no-pii"], "patterns": {"badge": 1, "email": 1}},
        {"direction": "response", "action": "block", "rules": ["no-secrets"], "patterns": {"github_token": 1}},
    ]
    assert TOLD[-1]["agent_id"].startswith("ag_")
    assert MAIL not in json.dumps(TOLD)
    assert SECRET not in json.dumps(TOLD)


def test_the_sdks_read_guarded_answers(shim: Shim) -> None:
    for case, understood in run_conformance(shim.url, "guarded-plain", *CASES).items():
        check(case, understood)


TOML = """
[[gateway.guardrails]]
name = "no-secrets"
patterns = ["secrets"]
action = "block"

[[gateway.guardrails]]
name = "no-pii"
patterns = ["pii"]
action = "mask"
direction = "response"
"""
AGENT = """
import json, urllib.request, urllib.error
def ask(text, stream):
    body = {"model": "stockade-scripted", "stream": stream, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request("http://gateway.internal:3128/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
print(json.dumps([ask("@say write to bob@example.com now", True), ask("KEY", False)]))
"""


def test_an_agent_is_stopped_and_the_log_says_why_and_not_what() -> None:
    with Instance.start(TOML) as stockade:
        program = AGENT.replace("KEY", SECRET)
        done = stockade.ctl("run", "--name", "leaky", "--", "python3", "-c", program)
        assert done.code == 0, done.err
        (streamed, words), (refused, error) = json.loads(done.out)
        assert streamed == 200
        assert "[masked:email]" in words
        assert "bob@" not in words
        assert refused == 400
        assert json.loads(error)["error"]["code"] == "guardrail_blocked"

        def outcomes() -> list[dict[str, Any]]:
            found = stockade.actions("leaky")
            return found if sum(each["verb"] == "egress.outcome" for each in found) == 2 else []

        stockade.wait(outcomes, 5)
        entries = outcomes()
        verdicts = [each for each in entries if each["verb"] == "gateway.guardrail"]
        assert [(each["verdict"], each["object"]) for each in verdicts] == [
            ("done", "no-pii"),
            ("denied", "no-secrets"),
        ]
        assert verdicts[0]["details"]["patterns"] == {"email": 1}
        assert verdicts[1]["reason"] == "guardrail_blocked: github_token"
        outcome = next(each["details"] for each in entries if each["verb"] == "egress.outcome")
        assert outcome["gen_ai.operation.name"] == "chat"
        assert outcome["gen_ai.request.model"] == outcome["gen_ai.response.model"] == "stockade-scripted"
        assert outcome["gen_ai.usage.output_tokens"] == outcome["output_tokens"] > 0
        assert 0 <= outcome["first_byte_ms"] <= outcome["duration_ms"]
        assert outcome["gateway"] == "embedded"
        told = [each["details"].get("guardrails") for each in entries if each["verb"] == "egress.outcome"]
        assert [each[0]["action"] for each in told] == ["mask", "block"]
        state = b"".join(path.read_bytes() for path in (stockade.directory / "state").rglob("*") if path.is_file())
        assert SECRET.encode() not in state.replace(program.encode(), b""), "no matched text in the log"
