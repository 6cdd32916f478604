"""The official `openai` and `anthropic` SDKs, inside a sandbox, through the whole of Stockade: embedded and LiteLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import AGENTS_PYTHON, scripted_upstream
from tests.support.instance import Instance
from tests.support.litellm_proxy import MASTER_KEY, MODEL, MODEL_OF_MESSAGES, Proxy, litellm_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

CLIENT = Path(__file__).parents[1] / "support" / "conformance_client.py"
SDKS = AGENTS_PYTHON.parents[1]
STREAMED = [case for case in CASES if "_stream_" in case]


def understood(stockade: Instance, name: str, model: str, *cases: str, scopes: tuple[str, ...]) -> dict[str, Any]:
    """Run the client with the SDKs in a sandbox, with what the sandbox itself says of gateway and key."""
    assert AGENTS_PYTHON.exists(), "run ./bootstrap test (tests/e2e/requirements-agents.txt)"
    workspace = stockade.workspace(**{"client.py": CLIENT.read_text()})
    given = [word for scope in (f"fs:ro:{SDKS}=/opt/agents", *scopes) for word in ("--scope", scope)]
    done = stockade.run(
        f"exec /opt/agents/bin/python -I client.py $ANTHROPIC_BASE_URL {model} $OPENAI_API_KEY {' '.join(cases)}",
        "--name", name, "--workspace", f"{workspace}:ro", "--policy", "no-models", *given, seconds=110,
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    return {line.pop("case"): line for line in lines}


NO_MODELS = {"no-models.yaml": "kind: Policy\nname: no-models\nversion: 1\nextends: default\nscopes: []\n"}


# --- the embedded gateway


@pytest.fixture(scope="module")
def embedded() -> Iterator[Instance]:
    with Instance.start('[gateway]\nkind = "embedded"\n', policies=NO_MODELS) as instance:
        yield instance


@pytest.fixture(scope="module")
def by_embedded(embedded: Instance) -> dict[str, Any]:
    return understood(embedded, "sdks", "scripted", *CASES, "models_openai", scopes=("llm:scripted*",))


@pytest.mark.parametrize("case", CASES)
def test_embedded_is_understood(by_embedded: dict[str, Any], case: str) -> None:
    check(case, by_embedded[case])


def test_embedded_lists_models_to_an_sdk(by_embedded: dict[str, Any]) -> None:
    assert by_embedded["models_openai"]["models"] == ["stockade-scripted"]


def test_embedded_calls_are_in_the_log_and_metered(embedded: Instance, by_embedded: dict[str, Any]) -> None:
    entries = embedded.actions("sdks")
    asked = [entry for entry in entries if entry["verb"] == "egress.request"]
    ended = [entry for entry in entries if entry["verb"] == "egress.outcome"]
    turns = sum(len(by_embedded[case]["turns"]) for case in CASES)
    calls = [entry for entry in asked if entry["details"].get("model") == "scripted"]
    assert len(calls) == turns
    assert {entry["verdict"] for entry in asked} == {"allowed"}
    assert len(ended) == len(asked)
    tokens = sum(turn["input_tokens"] + turn["output_tokens"] for case in CASES for turn in by_embedded[case]["turns"])
    metered = sum(entry["details"].get(f"{way}_tokens", 0) for entry in ended for way in ("input", "output"))
    assert metered == tokens
    spend = embedded.json("inspect", "sdks")["spend"]
    assert spend["input_tokens"] + spend["output_tokens"] == tokens
    # Nothing of what was said is in the log, only digests of it.
    assert "some length" not in json.dumps(entries)


def test_a_model_that_is_not_granted_is_an_sdks_own_denial(embedded: Instance) -> None:
    found = understood(embedded, "ungranted", "scripted", "chat_whole_text", "messages_stream_text", scopes=())
    for case in ("chat_whole_text", "messages_stream_text"):
        assert "PermissionDenied" in found[case]["error"]
        assert "llm:scripted" in found[case]["error"]


# --- LiteLLM


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with scripted_upstream() as upstream, litellm_proxy(upstream) as running:
        yield running


@pytest.fixture(scope="module")
def litellm(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    key = tmp_path_factory.mktemp("gateway") / "gateway.key"
    key.write_text(f"{proxy.key}\n")
    key.chmod(0o600)
    text = f'[gateway]\nkind = "litellm"\nurl = "{proxy.url}"\ncredential_file = "{key}"\n'
    with Instance.start(text, policies=NO_MODELS) as instance:
        yield instance


@pytest.fixture(scope="module")
def by_litellm(litellm: Instance) -> dict[str, Any]:
    messages = [case for case in CASES if case.startswith("messages")]
    others = [case for case in CASES if case not in messages]
    return {
        **understood(litellm, "openai", MODEL, *others, "models_openai", scopes=(f"llm:{MODEL}",)),
        **understood(litellm, "anthropic", MODEL_OF_MESSAGES, *messages, scopes=(f"llm:{MODEL_OF_MESSAGES}",)),
    }


@pytest.mark.parametrize("case", CASES)
def test_litellm_is_understood(by_litellm: dict[str, Any], case: str) -> None:
    check(case, by_litellm[case])


def test_litellm_knows_whose_calls_they_are(litellm: Instance, by_litellm: dict[str, Any], proxy: Proxy) -> None:
    turns = sum(len(by_litellm[case]["turns"]) for case in CASES)
    litellm.wait(lambda: len(proxy.logged()) >= turns, 20)
    ids = {name: litellm.json("inspect", name)["agent_id"] for name in ("openai", "anthropic")}
    assert {(entry["end_user"], entry["session"]) for entry in proxy.logged()} == set(ids.items())
    assert all(f"agent:{entry['end_user']}" in str(entry["tags"]) for entry in proxy.logged())
    costs = [e["details"].get("cost_usd") for e in litellm.actions("openai") if e["verb"] == "egress.outcome"]
    assert sum(cost or 0 for cost in costs) > 0


def test_the_gateways_key_never_comes_inside_and_its_administration_is_out_of_reach(litellm: Instance) -> None:
    litellm.launch("--name", "curious", "--", "sleep", "1000")
    paths = ("/key/info", "/model/info", "/config/yaml", "/user/list", "/v1/files", "/health", "/ui", "/metrics")
    script = "; ".join(
        f"curl -sS -m 10 -o /dev/null -w '%{{http_code}} ' $STOCKADE_GATEWAY_URL{path}" for path in paths
    )
    assert set(litellm.ctl("exec", "curious", "--", "sh", "-c", script).out.split()) == {"403"}
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "@say fine"}]})
    call = f"curl -sS -m 20 -i -H 'Content-Type: application/json' -d '{body}' $OPENAI_BASE_URL/chat/completions; env"
    done = litellm.ctl("exec", "curious", "--", "sh", "-c", call)
    assert "fine" in done.out
    assert MASTER_KEY not in done.out
    assert MASTER_KEY not in json.dumps(litellm.actions())
    litellm.ctl("kill", "curious")


def test_an_agent_cannot_be_somebody_else_to_litellm(
    litellm: Instance, by_litellm: dict[str, Any], proxy: Proxy
) -> None:
    assert by_litellm
    before = len(proxy.logged())
    litellm.launch("--name", "forger", "--", "sleep", "1000")
    forged = {"user": "victim", "metadata": {"user_id": "victim", "tags": ["victim"]}, "tags": ["victim"]}
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "@say fine"}], **forged})
    headers = "-H 'x-litellm-customer-id: victim' -H 'x-litellm-tags: victim' -H 'x-litellm-session-id: victim'"
    call = f"curl -sS -m 20 {headers} -H 'Content-Type: application/json' -d '{body}' $OPENAI_BASE_URL/chat/completions"
    assert "fine" in litellm.ctl("exec", "forger", "--", "sh", "-c", call).out

    def noted() -> list[dict[str, Any]]:  # it may still be writing down what was asked before
        return [each for each in proxy.logged()[before:] if each["end_user"] != "curious"]

    litellm.wait(noted)
    assert noted()[-1]["end_user"] == "forger"
    assert "victim" not in json.dumps(noted())
    litellm.ctl("kill", "forger")
