"""Attempts to reach another model than the one that is granted, by its name written or placed in another way.

Each is refused with nothing upstream, or arrives as the granted model with no trace of the other. Its twin is a worker
that copies what it got: what then arrives does name the other model to a reader that believes all it can.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import unicodedata
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.attempt import TALLY
from tests.support.egress_plane import Upstream, running

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts an egress worker as its own user")

MINE: Final = "model-a"
OTHER: Final = "model-b"
LOOK_ALIKES: Final = str.maketrans({"е": "e", "о": "o", "ｍ": "m", "‐": "-", "−": "-", "\u200b": None, "\0": None})  # noqa: RUF001 - they are the attempt
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
GEMINI = {"contents": [{"parts": [{"text": "hello"}]}]}
BY_PATH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {**CHAT, "max_tokens": 9},
    "/v1/completions": {"prompt": "hello"},
    "/v1/embeddings": {"input": "hello"},
}


@dataclass(frozen=True)
class Attempt:
    name: str
    body: bytes
    path: str = "/v1/chat/completions"
    headers: tuple[str, ...] = ()
    method: str = "POST"
    kind: str = "application/json"
    passes: bool = False
    """It goes on as the granted model; else it is refused."""

    @property
    def request(self) -> bytes:
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: gateway.internal:3128", "Connection: close"]
        if self.method == "POST":
            lines += [f"Content-Type: {self.kind}", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, *self.headers]).encode() + b"\r\n\r\n" + self.body


def call(model: Any = MINE, **fields: Any) -> bytes:
    return json.dumps({"model": model, **CHAT, **fields}).encode()


def raw(members: str) -> bytes:
    """An object with these members as they are written here."""
    return b"{%s,%s" % (members.encode(), json.dumps(CHAT).encode()[1:])


NAMES = {
    "case": "MODEL-B", "a space after": "model-b ", "a space before": " model-b", "a tab": "model-b\t",
    "a line end": "model-b\n", "nul": "model-b\0", "zero width": "model\u200b-b", "a hyphen of another kind": "model‐b",  # noqa: RUF001
    "a minus": "model−b", "cyrillic": "modеl-b", "full width": "ｍodel-b", "plain": "model-b",  # noqa: RUF001
    "a provider": "openai/model-b", "a proxy as provider": "litellm_proxy/model-b", "two providers": "x/openai/model-b",
    "a list in text": "model-a,model-b", "a list with spaces": "model-a, model-b", "semicolon": "model-a;model-b",
    "bar": "model-a|model-b", "a path up": "model-a/../model-b", "only up": "../model-b",
    "a query": "model-a?model=model-b",
    "a fragment": "model-a#model-b", "at": "model-a@model-b", "colon": "model-a:model-b", "plus": "model-a+model-b",
    "a template": "{{model-b}}", "percent": "model%2Db", "quotes": '"model-b"',
    "a header": "model-a\r\nx-model: model-b",
}  # fmt: skip

VALUES: dict[str, Any] = {
    "array": [MINE, OTHER], "array of one": [OTHER], "object": {"name": OTHER}, "object of the granted": {MINE: OTHER},
    "nested array": [[MINE], [OTHER]],
}  # fmt: skip

TWICE = {
    "the other first": (f'"model":"{OTHER}","model":"{MINE}"', True),
    "the other last": (f'"model":"{MINE}","model":"{OTHER}"', False),
    "escaped key first": (f'"\\u006dodel":"{OTHER}","model":"{MINE}"', True),
    "escaped key last": (f'"model":"{MINE}","\\u006dodel":"{OTHER}"', False),
    "escaped value": (f'"model":"\\u006dodel-\\u0062","x":"{MINE}"', False),
    "escaped key alone": (f'"\\u006d\\u006f\\u0064\\u0065\\u006c":"{OTHER}"', False),
    "upper case key": (f'"model":"{MINE}","MODEL":"{OTHER}"', True),
    "title case key": (f'"Model":"{OTHER}","model":"{MINE}"', True),
    "a key with a space": (f'"model":"{MINE}","model ":"{OTHER}"', True),
    "a key with nul": (f'"model":"{MINE}","model\\u0000":"{OTHER}"', True),
    "a key with a long s": (f'"model":"{MINE}","modeＬ":"{OTHER}"', True),  # noqa: RUF001
    "a lone surrogate": (f'"model":"{MINE}","\\ud800model":"{OTHER}"', True),
}

FIELDS: dict[str, Any] = {
    "fallbacks": [OTHER], "fallbacks of litellm": None, "context_window_fallbacks": [{MINE: [OTHER]}],
    "content_policy_fallbacks": [{MINE: [OTHER]}], "default_fallbacks": [OTHER], "models": [MINE, OTHER],
    "model_list": [{"model_name": MINE, "litellm_params": {"model": f"openai/{OTHER}"}}],
    "model_group_alias": {MINE: OTHER}, "model_alias_map": {MINE: OTHER}, "aliases": {MINE: OTHER},
    "user_config": {"model_list": [{"model_name": MINE, "litellm_params": {"model": f"openai/{OTHER}"}}]},
    "router_settings_override": {"fallbacks": [{MINE: [OTHER]}]}, "litellm_params": {"model": OTHER},
    "litellm_metadata": {"model_group": OTHER}, "metadata": {"model": OTHER, "model_group": OTHER, "user_id": "u"},
    "extra_body": {"model": OTHER}, "extra_query": {"model": OTHER}, "extra_headers": {"x-litellm-model": OTHER},
    "provider": {"model": OTHER, "order": ["x"]}, "model_info": {"id": OTHER}, "specific_deployment": OTHER,
    "deployment_id": OTHER, "engine": OTHER, "azure_deployment": OTHER, "base_model": OTHER, "silent_model": OTHER,
    "target_model_names": OTHER, "prompt_id": OTHER, "moderation": {"model": OTHER}, "transcription": {"model": OTHER},
    "custom_llm_provider": OTHER, "api_base": f"http://gateway.internal/{OTHER}",
    "plugins": [{"id": "x", "model": OTHER}],
    "speculative": {"draft_model": OTHER}, "model_id": OTHER, "user_model": OTHER, "override_model": OTHER,
}  # fmt: skip
FIELDS["fallbacks of litellm"] = [{MINE: [OTHER]}]

NESTED: dict[str, tuple[str, dict[str, Any]]] = {
    "in reasoning": ("/v1/chat/completions", {"reasoning": {"effort": "low", "model": OTHER}}),
    "extra_body in extra_body": ("/v1/chat/completions", {"extra_body": {"extra_body": {"model": OTHER}}}),
    "extra_body in reasoning": ("/v1/responses", {"reasoning": {"extra_body": {"model": OTHER}}}),
    "in stream_options": ("/v1/chat/completions", {"stream_options": {"include_usage": True, "Model": OTHER}}),
    "in audio": ("/v1/chat/completions", {"audio": {"voice": "alloy", "model": OTHER}}),
    "in a tool": ("/v1/chat/completions", {"tools": [{"type": "function", "model": OTHER, "function": {"name": "f"}}]}),
    "in a tool's function": (
        "/v1/chat/completions", {"tools": [{"type": "function", "function": {"name": "f", "model": OTHER}}]},
    ),
    "in functions": ("/v1/chat/completions", {"functions": [{"name": "f", "model": OTHER}]}),
    "in a tool that is taken out": ("/v1/responses", {"tools": [{"type": "image_generation", "model": OTHER}]}),
    "an adviser": ("/v1/messages", {"tools": [{"type": "advisor_20260301", "name": "advisor", "model": OTHER}]}),
    "in a tool of the client": ("/v1/messages", {"tools": [{"name": "f", "input_schema": {}, "model": OTHER}]}),
    "in context_management": ("/v1/messages", {"context_management": {"edits": [{"type": "compact", "model": OTHER}]}}),
    "in compaction": ("/v1/responses", {"context_management": [{"type": "compaction", "model": OTHER}]}),
    "in thinking": ("/v1/messages", {"thinking": {"type": "adaptive", "fallbacks": [{"model": OTHER}]}}),
    "in output_config": ("/v1/messages", {"output_config": {"effort": "low", "models": [OTHER]}}),
    "in metadata of messages": ("/v1/messages", {"metadata": {"user_id": "u", "model": OTHER}}),
    "in text": ("/v1/responses", {"text": {"verbosity": "low", "model": OTHER}}),
    "in tool_choice": (
        "/v1/responses",
        {
            "tools": [{"type": "function", "name": "f"}],
            "tool_choice": {"type": "function", "name": "f", "model": OTHER},
        },
    ),
    "in prompt of responses": ("/v1/responses", {"prompt": {"id": "p", "model": OTHER}}),
    "in generationConfig": (f"/v1beta/models/{MINE}:generateContent", {"generationConfig": {"model": OTHER}}),
    "in routingConfig": (
        f"/v1beta/models/{MINE}:generateContent",
        {"generationConfig": {"routingConfig": {"manualMode": {"modelName": OTHER}}}},
    ),
    "beside the path": (f"/v1beta/models/{MINE}:generateContent", {"model": f"models/{OTHER}"}),
    "in cachedContent": (f"/v1beta/models/{MINE}:generateContent", {"cachedContent": f"cachedContents/{OTHER}"}),
}  # fmt: skip

PATHS = {
    "deployment": f"/openai/deployments/{OTHER}/chat/completions", "engine": f"/engines/{OTHER}/chat/completions",
    "engine of v1": f"/v1/engines/{OTHER}/completions", "behind": f"/v1/chat/completions/{OTHER}",
    "in front": f"/{OTHER}/v1/chat/completions", "vertex": f"/vertex_ai/v1/models/{OTHER}:generateContent",
    "gemini": f"/v1beta/models/{OTHER}:generateContent",
    "gemini passed through": f"/gemini/v1beta/models/{OTHER}:generateContent",
    "two in gemini": f"/v1beta/models/{MINE}/../{OTHER}:generateContent",
    "encoded up": f"/v1beta/models/{MINE}%2f..%2f{OTHER}:generateContent",
    "encoded colon": f"/v1beta/models/{OTHER}%3AgenerateContent",
    "tuned": f"/v1beta/tunedModels/{OTHER}:generateContent",
    "bedrock": f"/bedrock/model/{OTHER}/converse", "anthropic passed through": f"/anthropic/v1/messages?model={OTHER}",
    "realtime": f"/v1/realtime?model={OTHER}", "images": f"/v1/images/generations?model={OTHER}",
    "batches": f"/v1/messages/batches?model={OTHER}",
}  # fmt: skip


def attempts() -> Iterator[Attempt]:
    yield from in_the_body()
    yield from in_path_query_and_headers()
    yield from read_in_another_way()


def in_the_body() -> Iterator[Attempt]:
    for path, content in BY_PATH.items():
        for name, text in NAMES.items():
            yield Attempt(f"name, {path}: {name}", json.dumps({"model": text, **content}).encode(), path)
    for name, value in VALUES.items():
        yield Attempt(f"value: {name}", call(value))
    for name, (members, passes) in TWICE.items():
        yield Attempt(f"key: {name}", raw(members), passes=passes)
    for name, value in FIELDS.items():
        field = name.partition(" ")[0]
        for path, content in BY_PATH.items():
            body = json.dumps({"model": MINE, **content, field: value}).encode()
            if OTHER in body.decode():
                yield Attempt(f"field, {path}: {name}", body, path, passes=True)
    for name, (path, fields) in NESTED.items():
        whole = {**GEMINI, **fields} if "v1beta" in path else {"model": MINE, **BY_PATH[path], **fields}
        yield Attempt(f"nested: {name}", json.dumps(whole).encode(), path, passes=True)


def in_path_query_and_headers() -> Iterator[Attempt]:
    for name, path in PATHS.items():
        yield Attempt(f"path: {name}", json.dumps({"model": MINE, **GEMINI, **CHAT}).encode(), path)
    yield Attempt("path: list of models", b"", f"/v1/models/{OTHER}", method="GET")
    yield Attempt("path: two in a list", b"", f"/v1/models/{MINE}/../{OTHER}", method="GET")
    for key in ("model", "Model", "fallbacks", "engine", "custom_llm_provider", "deployment", "beta=x%26model"):
        yield Attempt(f"query: {key}", call(), f"/v1/chat/completions?{key}={OTHER}", passes=True)
    yield Attempt("query: after alt", call(), f"/v1/chat/completions?alt=sse%26model%3D{OTHER}", passes=True)
    for key in (
        "model", "x-model", "x-litellm-model", "x-litellm-fallbacks", "openai-model", "x-goog-model",
        "x-stainless-model",
        "x-portkey-config", "helicone-fallbacks", "x-http-method-override", "x-original-url", "x-rewrite-url", "cookie",
    ):  # fmt: skip
        yield Attempt(f"header: {key}", call(), headers=(f"{key}: {OTHER}",), passes=True)


def read_in_another_way() -> Iterator[Attempt]:
    form = urllib.parse.urlencode({"model": OTHER, "messages": "x"}).encode()
    yield Attempt("type: form", form, kind="application/x-www-form-urlencoded")
    yield Attempt("type: form within JSON", call(x=f"&model={OTHER}&"), kind="application/x-www-form-urlencoded")
    yield Attempt("type: two", call(OTHER), headers=("Content-Type: text/plain",))
    yield Attempt("type: UTF-16", call(OTHER).decode().encode("utf-16"), kind="application/json; charset=utf-16")
    yield Attempt("type: UTF-16 unsaid", call(OTHER).decode().encode("utf-16"))
    yield Attempt("type: gzip", gzip.compress(call(OTHER)), headers=("Content-Encoding: gzip",))
    yield Attempt("body: two documents", call() + call(OTHER))
    yield Attempt("body: two lines", call() + b"\n" + call(OTHER))
    yield Attempt("body: a list of two", b"[" + call() + b"," + call(OTHER) + b"]")
    yield Attempt("body: a mark before", b"\xef\xbb\xbf" + call(OTHER))
    yield Attempt("body: a comment", b'{"model":"model-a"/*","model":"model-b*/,"messages":[]}')
    yield Attempt("body: overlong", call().replace(b'"model"', b'"\xc1\xadodel":"model-b","model"'))


ATTEMPTS: Final = {attempt.name: attempt for attempt in attempts()}


def mentions(received: bytes) -> bool:
    """Tell whether a reader that believes all it can finds the other model in a request."""
    head, _, body = received.partition(b"\r\n\r\n")
    texts = [head.decode("latin-1"), body.decode("utf-8", "replace"), urllib.parse.unquote_plus(head.decode("latin-1"))]
    texts.append(urllib.parse.unquote_plus(body.decode("utf-8", "replace")))
    if body[:2] == b"\x1f\x8b":
        texts.append(gzip.decompress(body).decode())
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        texts.append(body.decode("utf-16"))
    strings: list[str] = []

    def take(pairs: list[tuple[str, Any]]) -> None:
        for key, value in pairs:
            strings.extend(
                each for each in (key, *(value if isinstance(value, list) else [value])) if isinstance(each, str)
            )

    try:
        json.loads(body, object_pairs_hook=take)
    except ValueError:
        strings.clear()
    plain = (unicodedata.normalize("NFKC", text.translate(LOOK_ALIKES)).casefold() for text in (*texts, *strings))
    return any(OTHER in text for text in plain)


@dataclass
class Seen:
    """What came of one attempt."""

    answer: bytes
    upstream: list[bytes]
    models: list[str]
    copied: list[bytes]


async def _make(upstream: Upstream) -> dict[str, Seen]:
    found = {}
    async with running(upstream) as plane:
        plane.grant(f"llm:{MINE}")
        host, port = plane.configuration.host.split(":")
        for name, attempt in ATTEMPTS.items():
            upstream.received.clear()
            plane.asks.clear()
            answer = await plane.exchange(attempt.request, seconds=20)
            arrived = list(upstream.received)
            asked = [ask.request.model for ask in plane.asks]
            upstream.received.clear()
            # The twin: a worker that passes what it got.
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(attempt.request)
            await asyncio.wait_for(reader.read(-1), 20)
            writer.close()
            found[name] = Seen(answer, arrived, asked, list(upstream.received))
    return found


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return asyncio.run(_make(Upstream()))


@pytest.mark.parametrize("name", ATTEMPTS)
def test_no_other_model_is_reached(seen: dict[str, Seen], name: str) -> None:
    attempt, result = ATTEMPTS[name], seen[name]
    status = int(result.answer.split(b" ")[1])
    if attempt.passes:
        (arrived,) = result.upstream
        assert status == 200
        assert not mentions(arrived), arrived
        assert result.models == [MINE]
        assert f'"model":"{MINE}"'.encode() in arrived or f"/{MINE}:".encode() in arrived.split(b"\r\n")[0]
    else:
        assert 400 <= status < 500, result.answer
        assert result.upstream == []
        assert MINE not in result.models
    TALLY.refused += 1


@pytest.mark.parametrize("name", ATTEMPTS)
def test_its_twin_names_the_other_model_upstream(seen: dict[str, Seen], name: str) -> None:
    (arrived,) = seen[name].copied
    assert mentions(arrived)
    TALLY.twins += 1
