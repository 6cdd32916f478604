"""What of a model call goes out: fields, tools and sources by allow-lists; and what a call weighs before it is made."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.bodyjson import Scales, containers_max, digits_max, members_max, values_max
from gateway_client.egress.callfields import noted_max
from gateway_client.egress.modelapi import BadCall, Call, Endpoint, check_type, clean_query, read_call
from gateway_client.egress.request import Dialect
from gateway_client.egress.weight import blob_bytes_min, choices_max, tokens_per_blob_min

CHAT = Endpoint(Dialect.OPENAI_CHAT, "/v1/chat/completions")
RESPONSES = Endpoint(Dialect.OPENAI_RESPONSES, "/v1/responses")
COMPLETIONS = Endpoint(Dialect.OPENAI_COMPLETIONS, "/v1/completions")
EMBEDDINGS = Endpoint(Dialect.OPENAI_EMBEDDINGS, "/v1/embeddings")
MESSAGES = Endpoint(Dialect.ANTHROPIC_MESSAGES, "/v1/messages")
GEMINI = Endpoint(Dialect.GEMINI_GENERATE, "/v1beta/models/g:generateContent", model="g")
ALL = (CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS, MESSAGES, GEMINI)


def call(where: Endpoint, **fields: Any) -> Call:
    return read_call(where, json.dumps({"model": "m", **fields}).encode())


def sent(where: Endpoint, **fields: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(call(where, **fields).body)
    return document


def refused(where: Endpoint, **fields: Any) -> str:
    with pytest.raises(BadCall) as caught:
        call(where, **fields)
    return caught.value.reason


# --- content type


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b'application/json;charset="UTF-8"',
    ],
)
def test_json_is_taken(value: bytes) -> None:
    check_type(((b"content-type", value),))
    check_type(())


@pytest.mark.parametrize(
    "header",
    [
        (b"content-type", b"application/x-www-form-urlencoded"),
        (b"content-type", b"multipart/form-data; boundary=x"),
        (b"content-type", b"text/plain"),
        (b"content-type", b"application/json, application/x-www-form-urlencoded"),
        (b"content-type", b"application/json; charset=utf-16"),
        (b"content-type", b"application/json; x=application/x-www-form-urlencoded"),
        (b"content-encoding", b"gzip"),
    ],
)
def test_a_body_that_is_read_in_another_way_is_refused(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadCall) as caught:
        check_type((header,))
    assert caught.value.status == 415


# --- fields


@pytest.mark.parametrize("where", ALL)
@pytest.mark.parametrize(
    "field",
    [
        "api_base", "api_key", "base_url", "user_config", "router_settings_override", "fallbacks", "mock_response",
        "litellm_metadata", "tags", "user", "extra_body", "extra_headers", "custom_llm_provider", "guardrails",
        "cache", "container", "mcp_servers", "web_search_options", "models", "provider", "plugins", "route",
        "cachedContent", "background", "moderation", "workspace_id", "silent_model", "num_retries", "Messages", "x",
    ],
)  # fmt: skip
def test_what_no_table_names_does_not_go_out_and_is_noted(where: Endpoint, field: str) -> None:
    found = call(where, **{field: [{"cheap": ["expensive"]}]})
    assert field not in json.loads(found.body)
    assert field in found.dropped


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        (CHAT, {"messages": [], "temperature": 0.5, "stream_options": {"include_usage": True}, "response_format": {},
                "reasoning_effort": "low", "max_completion_tokens": 5, "seed": 1, "stop": ["x"], "store": False,
                "parallel_tool_calls": True, "prompt_cache_key": "k", "top_p": 1, "n": 1}),
        (RESPONSES, {"input": "x", "instructions": "y", "include": ["reasoning.encrypted_content"], "store": False,
                     "reasoning": {"effort": "high"}, "text": {"verbosity": "low"}, "previous_response_id": "resp_1"}),
        (MESSAGES, {"messages": [], "max_tokens": 9, "system": [{"type": "text", "text": "x"}], "thinking": {},
                    "betas": ["a"], "context_management": {"edits": []}, "output_config": {"effort": "low"},
                    "metadata": {"user_id": "u"}, "stop_sequences": ["x"], "top_k": 5, "temperature": 1}),
        (EMBEDDINGS, {"input": ["x"], "dimensions": 5, "encoding_format": "base64"}),
        (COMPLETIONS, {"prompt": "x", "suffix": "y", "echo": True, "best_of": 1, "logprobs": 1}),
    ],
)  # fmt: skip
def test_what_sdks_and_coding_agents_send_goes_out_as_it_is(where: Endpoint, fields: dict[str, Any]) -> None:
    found = call(where, **fields)
    assert json.loads(found.body) == {"model": "m", **fields}
    assert found.dropped == ()


def test_the_path_alone_names_the_model_of_the_gemini_dialect() -> None:
    found = call(GEMINI, contents=[], generationConfig={"maxOutputTokens": 5})
    assert json.loads(found.body) == {"contents": [], "generationConfig": {"maxOutputTokens": 5}}
    assert (found.model, found.dropped) == ("g", ("model",))


def test_what_is_noted_is_bounded_and_plain() -> None:
    found = call(CHAT, **{f"x{n}\u202e" + "y" * 999: n for n in range(99)})
    assert len(found.dropped) == noted_max
    assert all(len(each) <= 64 and each.isascii() for each in found.dropped)


SCHEMA = {"type": "object", "properties": {"model": {"type": "string"}, "fallbacks": {"type": "array"}}, "model": "x"}


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        (CHAT, {"tools": [{"type": "function", "function": {"name": "model", "parameters": SCHEMA}}]}),
        (CHAT, {"functions": [{"name": "f", "parameters": SCHEMA}], "modalities": ["text"]}),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}),
        (CHAT, {"messages": [{"role": "user", "content": "x", "model": "said"}], "logit_bias": {"50256": -100}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": '{"model": "x"}', "model": "said"}]}),
        (RESPONSES, {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f",
                                                                             "parameters": SCHEMA}]}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": SCHEMA, "input_examples": [{"model": "x"}]}]}),
        (MESSAGES, {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}}),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"model": "x"}}]}]}),
    ],
)  # fmt: skip
def test_what_is_named_like_a_model_in_schemas_and_in_what_is_said_goes_out_as_it_is(
    where: Endpoint, fields: dict[str, Any]
) -> None:
    found = call(where, **fields)
    assert json.loads(found.body) == {"model": "m", **fields}
    assert found.dropped == ()


def test_what_is_named_like_a_model_in_schemas_of_the_gemini_dialect_goes_out_too() -> None:
    fields = {
        "generationConfig": {"responseSchema": SCHEMA, "responseJsonSchema": SCHEMA, "responseModalities": ["TEXT"]},
        "tools": [{"functionDeclarations": [{"name": "f", "parameters": SCHEMA, "response": SCHEMA}]}],
    }
    assert json.loads(call(GEMINI, **fields).body) == fields


def test_what_picks_a_model_within_a_setting_is_taken_out_and_noted() -> None:
    inner = {"effort": "low", "a": [{"modelName": "x"}, {"b": {"Fallbacks": [], "extra_body": {}}}]}
    found = call(CHAT, reasoning=inner, stream_options={"include_usage": True})
    assert json.loads(found.body)["reasoning"] == {"effort": "low", "a": [{}, {"b": {}}]}
    assert set(found.dropped) == {"reasoning.modelName", "reasoning.Fallbacks", "reasoning.extra_body"}


@pytest.mark.parametrize("name", ["parameters", "response", "properties", "schema"])
def test_a_setting_without_schemas_hides_nothing_in_what_is_named_like_one(name: str) -> None:
    found = call(CHAT, reasoning={name: {"model": "x"}}, stream_options={name: [{"fallbacks": ["x"]}]})
    document = json.loads(found.body)
    assert (document["reasoning"], document["stream_options"]) == ({name: {}}, {name: [{}]})


# --- tools


FUNCTION = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"url": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("where", "tool"),
    [
        (CHAT, {"type": "mcp", "server_label": "l", "server_url": "litellm_proxy", "require_approval": "never"}),
        (CHAT, {"type": "web_search"}),
        (CHAT, {"googleSearch": {}}),
        (RESPONSES, {"type": "mcp", "server_url": "https://x.example"}),
        (RESPONSES, {"type": "web_search", "external_web_access": True}),
        (RESPONSES, {"type": "web_search_preview_2025_03_11"}),
        (RESPONSES, {"type": "file_search", "vector_store_ids": ["x"]}),
        (RESPONSES, {"type": "code_interpreter", "container": {"type": "auto"}}),
        (RESPONSES, {"type": "image_generation"}),
        (RESPONSES, {"type": "shell"}),
        (RESPONSES, {"type": "shell", "environment": {"type": "container_auto"}}),
        (RESPONSES, {"type": "new_tool"}),
        (MESSAGES, {"type": "web_search_20250305", "name": "web_search"}),
        (MESSAGES, {"type": "web_fetch_20250910", "name": "web_fetch"}),
        (MESSAGES, {"type": "code_execution_20250825", "name": "code_execution"}),
        (MESSAGES, {"type": "mcp_toolset", "mcp_server_name": "x"}),
        (MESSAGES, {"type": "mcp", "server_url": "litellm_proxy"}),
        (GEMINI, {"googleSearch": {}}),
        (GEMINI, {"codeExecution": {}}),
        (GEMINI, {"urlContext": {}}),
    ],
)
def test_a_tool_that_runs_elsewhere_is_taken_out_and_the_others_stay(where: Endpoint, tool: dict[str, Any]) -> None:
    ours = {"functionDeclarations": [{"name": "f"}]} if where is GEMINI else FUNCTION
    found = call(where, tools=[tool, ours])
    assert json.loads(found.body)["tools"] == [ours]
    assert any(each.startswith("tool:") for each in found.dropped)
    alone = sent(where, tools=[tool], tool_choice="required")
    assert not {"tools", "tool_choice"} & alone.keys()


@pytest.mark.parametrize(
    ("where", "tools"),
    [
        (CHAT, [{"type": "function", "function": {"name": "f"}}, {"type": "custom", "custom": {"name": "c"}}]),
        (RESPONSES, [FUNCTION, {"type": "custom", "name": "apply_patch"}, {"type": "local_shell"},
                     {"type": "shell", "environment": {"type": "local"}}, {"type": "apply_patch"},
                     {"type": "computer_use_preview"}, {"type": "namespace", "name": "n", "tools": [FUNCTION]}]),
        (MESSAGES, [{"name": "Bash", "input_schema": {}}, {"type": "custom", "name": "x"}, {"type": "bash_20250124"},
                    {"type": "text_editor_20250728"}, {"type": "memory_20250818"}, {"type": "computer_20250124"}]),
        (GEMINI, [{"functionDeclarations": [{"name": "f"}]}]),
    ],
)  # fmt: skip
def test_tools_that_the_client_runs_go_out_as_they_are(where: Endpoint, tools: list[Any]) -> None:
    assert sent(where, tools=tools)["tools"] == tools


def test_a_tool_within_a_namespace_or_added_on_the_way_is_found() -> None:
    web = {"type": "web_search"}
    inner = sent(RESPONSES, tools=[{"type": "namespace", "name": "n", "tools": [web, FUNCTION]}])["tools"]
    assert inner == [{"type": "namespace", "name": "n", "tools": [FUNCTION]}]
    assert refused(RESPONSES, input=[{"type": "tool_search_output", "tools": [web]}]) == "tool_refused"
    added = [{"role": "user", "content": [{"type": "tool_addition", "tool": {"type": "web_fetch_20250910"}}]}]
    assert refused(MESSAGES, messages=added) == "tool_refused"
    assert sent(RESPONSES, input=[{"type": "tool_search_output", "tools": [FUNCTION]}])


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "mcp", "server_label": "l"},
        {"type": "web_search"},
        {"type": "allowed_tools", "tools": [{"type": "mcp"}]},
    ],
)
def test_a_choice_of_a_tool_that_runs_elsewhere_does_not_go_out(choice: dict[str, Any]) -> None:
    assert "tool_choice" not in sent(RESPONSES, tools=[FUNCTION], tool_choice=choice)
    for good in ("auto", {"type": "function", "name": "f"}, {"type": "allowed_tools", "tools": [{"type": "function"}]}):
        assert sent(RESPONSES, tools=[FUNCTION], tool_choice=good)["tool_choice"] == good


# --- sources


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    "url", ["http://x.example/?leak", "https://x", " \x00HTTPS://x", "ht\ntp://x", "gs://b/o", "https:x"]
)
@pytest.mark.parametrize(
    ("where", "shape"),
    [
        (CHAT, lambda url: {"messages": user({"type": "image_url", "image_url": {"url": url}})}),
        (CHAT, lambda url: {"messages": user({"type": "image_url", "image_url": url})}),
        (CHAT, lambda url: {"messages": user({"type": "file", "file": {"file_id": url}})}),
        (CHAT, lambda url: {"messages": user({"type": "video_url", "video_url": {"url": url}})}),
        (RESPONSES, lambda url: {"input": user({"type": "input_image", "image_url": url})}),
        (RESPONSES, lambda url: {"input": user({"type": "input_file", "file_url": url})}),
        (RESPONSES, lambda url: {"input": [{"type": "function_call_output", "output": [{"image_url": url}]}]}),
        (RESPONSES, lambda url: {"input": [{"type": "computer_call_output",
                                            "output": {"type": "computer_screenshot", "image_url": url}}]}),
        (MESSAGES, lambda url: {"messages": user({"type": "image", "source": {"type": "url", "url": url}})}),
        (MESSAGES, lambda url: {"messages": user({"type": "tool_result", "content": [
            {"type": "document", "source": {"type": "url", "url": url}}]})}),
        (GEMINI, lambda url: {"contents": [{"parts": [{"fileData": {"fileUri": url}}]}]}),
        (GEMINI, lambda url: {"contents": [{"parts": [{"file_data": {"file_uri": url}}]}]}),
        (GEMINI, lambda url: {"systemInstruction": {"parts": [{"fileData": {"fileUri": url}}]}}),
    ],
)  # fmt: skip
def test_a_source_by_url_is_refused(where: Endpoint, shape: Any, url: str) -> None:
    assert refused(where, **shape(url)) == "source_by_url"
    assert call(where, **shape("data:image/png;base64,aGk="))


def test_urls_that_nobody_fetches_pass() -> None:
    url = "https://x.example/a"
    assert call(CHAT, messages=[{"role": "user", "content": url}])
    assert call(CHAT, messages=user({"type": "text", "text": url}))
    assert call(CHAT, tools=[{"type": "function", "function": {"name": "f", "parameters": {"url": url}}}])
    assert call(RESPONSES, input=[{"type": "function_call", "name": "f", "arguments": json.dumps({"url": url})}])
    assert call(RESPONSES, input=user({"type": "output_text", "annotations": [{"type": "url_citation", "url": url}]}))
    assert call(MESSAGES, messages=user({"type": "tool_use", "name": "WebFetch", "input": {"url": url}}))
    assert call(MESSAGES, messages=user({"type": "search_result", "source": url, "content": []}))
    assert call(MESSAGES, messages=user({"type": "document", "source": {"type": "text", "data": "Note: " + url}}))
    assert call(GEMINI, contents=[{"parts": [{"functionCall": {"args": {"url": url}}}]}])


# --- weight


@pytest.mark.parametrize(
    ("where", "fields", "most", "choices"),
    [
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 900}, 900, 1),
        (CHAT, {"max_tokens": 900, "max_completion_tokens": 5, "n": 3}, 2700, 3),
        (CHAT, {"n": 50}, None, 50),
        (COMPLETIONS, {"max_tokens": 10, "best_of": 20, "n": 2}, 200, 20),
        (COMPLETIONS, {"max_tokens": 10, "n": 2, "prompt": ["a", "b", "c"]}, 60, 6),
        (COMPLETIONS, {"max_tokens": 10, "prompt": [1, 2, 3]}, 10, 1),
        (RESPONSES, {"max_output_tokens": 77}, 77, 1),
        (MESSAGES, {"max_tokens": 10, "thinking": {"type": "enabled", "budget_tokens": 5000}}, 5000, 1),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 5, "candidateCount": 4}}, 20, 4),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 5}, "generation_config": {"max_output_tokens": 9}}, 9, 1),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 5, "thinkingConfig": {"thinkingBudget": 99}}}, 99, 1),
        (GEMINI, {"generationConfig": {"maxOutputTokens": 5, "thinkingConfig": {"thinkingBudget": -1}}}, 5, 1),
        (EMBEDDINGS, {"input": "x"}, 0, 1),
        (CHAT, {"max_tokens": 7.0}, 7, 1),
    ],
)
def test_what_a_call_may_put_out(where: Endpoint, fields: dict[str, Any], most: int | None, choices: int) -> None:
    found = call(where, **fields)
    assert (found.max_tokens, found.choices) == (most, choices)


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        (CHAT, {"n": 0}),
        (CHAT, {"n": -1}),
        (CHAT, {"n": "3"}),
        (CHAT, {"n": choices_max + 1}),
        (CHAT, {"max_tokens": 1, "max_completion_tokens": -5}),
        (CHAT, {"max_completion_tokens": 1, "max_tokens": True}),
        (COMPLETIONS, {"n": choices_max, "prompt": ["a", "b"]}),
        (GEMINI, {"generationConfig": {"maxOutputTokens": "5"}}),
        (GEMINI, {"generationConfig": []}),
    ],
)
def test_a_limit_that_is_none_is_refused(where: Endpoint, fields: dict[str, Any]) -> None:
    assert refused(where, **fields) == "body_malformed"


def test_input_is_estimated_from_its_text_and_pictures_by_their_number() -> None:
    text = call(CHAT, messages=[{"role": "user", "content": "x" * 10_000}])
    assert 5_000 <= text.input_tokens < 5_100
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    assert tokens_per_blob_min <= call(CHAT, messages=user(picture)).input_tokens < 2 * tokens_per_blob_min
    words = {"type": "image_url", "image_url": {"url": "word " * blob_bytes_min}}
    assert call(CHAT, messages=user(words)).input_tokens > 2 * blob_bytes_min


# --- JSON


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    with pytest.raises(BadCall):
        read_call(CHAT, b'{"model":"m","temperature":%s}' % number.encode())
    assert read_call(CHAT, b'{"model":"m","temperature":1e30}')


def weigh(body: bytes, size: int = 16_384) -> None:
    scales = Scales()
    for start in range(0, len(body), size):
        scales.feed(body[start : start + size])


def test_a_body_is_weighed_before_it_is_parsed() -> None:
    for body, most in (
        (lambda count: b"[" + b"[]," * (count - 2) + b"[]]", containers_max),
        (lambda count: b"[" + b"0," * (count - 1) + b"0]", values_max),
        (lambda count: b"{" + b",".join([b'"":0'] * count) + b"}", members_max),
        (lambda count: b"9" * count, digits_max),
    ):
        weigh(body(most), 1_000_003)
        with pytest.raises(BadCall):
            weigh(body(most + 1), 1_000_003)
    weigh(b'{"text":"' + b"[{,:9" * 1_000_000 + b'"}')


@given(
    st.recursive(st.text('a"\\[{,:\n', max_size=6), lambda inner: st.lists(inner, max_size=4), max_leaves=20),
    st.integers(1, 9),
)
def test_what_is_in_strings_weighs_nothing_at_any_split(value: Any, size: int) -> None:
    body = json.dumps(value).encode()
    scales = Scales()
    for start in range(0, len(body), size):
        scales.feed(body[start : start + size])

    def count(each: Any) -> int:
        return 1 + sum(map(count, each)) if isinstance(each, list) else 0

    assert scales._containers == count(value)


def test_only_metered_forms_of_an_answer_can_be_asked_for() -> None:
    assert clean_query("alt=sse&key=x&alt=proto&beta=true&alt=media&altx=1") == "alt=sse&beta=true"
    assert clean_query("beta=x%26model=m&after=msg_1.2&limit=20&model=m&before_id=%6dodel") == "after=msg_1.2&limit=20"
