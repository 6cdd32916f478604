"""Scopes: read, written back, and what each covers."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.scope import BadScope, covers, format_scope, includes, missing_scope, parse_scope


def forward(method: str, path: str, *, host: str = "api.example.com", port: int = 80) -> EgressRequest:
    return EgressRequest(Form.FORWARD, method, "http", host, port, path)


def model(name: str, dialect: Dialect | None = Dialect.OPENAI_CHAT) -> EgressRequest:
    return EgressRequest(Form.MODEL, "POST", "http", "gateway.internal", 3128, "/v1/x", dialect=dialect, model=name)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("llm:*", "llm:*"),
        ("llm:openai/gpt-*", "llm:openai/gpt-*"),
        ("http:POST,GET,GET:http://API.example.com:80/v1/%7e/**", "http:GET,POST:http://api.example.com/v1/~/**"),
        ("http:*:https://a.b:8443/", "http:*:https://a.b:8443/"),
        ("tls:A.b.:443", "tls:a.b:443"),
        ("tls:[::1]:443", "tls:[::1]:443"),
        ("fs:ro:/srv/data", "fs:ro:/srv/data"),
        ("fs:rw:/srv/a=/in/b", "fs:rw:/srv/a=/in/b"),
        ("mcp:files/read_*", "mcp:files/read_*"),
    ],
)
def test_a_scope_has_one_canonical_text(text: str, canonical: str) -> None:
    scope = parse_scope(text)
    assert format_scope(scope) == canonical
    assert parse_scope(canonical) == scope


@pytest.mark.parametrize(
    "text",
    [
        "", "llm", "llm:", "llm:a b", "llm:a\n", "web:x", "http:GET:ftp://a/", "http:get:http://a/", "http:GET:http://a",
        "http::http://a/", "http:GET:http://*.a/**", "http:GET:http://u@a/", "http:GET:http://a/../b", "http:GET:http://a/***",
        "http:CONNECT:http://a/", "http:GET:http://0x7f.1/", "tls:a", "tls:*:443", "tls:a:0", "fs:ro:rel", "fs:xx:/a",
        "fs:ro:/a/../b", "fs:ro:/a//b", "mcp:a", "mcp:a/b c", "llm:" + "a" * 3000,
    ],
)  # fmt: skip
def test_what_is_no_scope_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(BadScope, match="cannot read scope"):
        parse_scope(text)


@given(st.text(max_size=60))
def test_reading_is_total(text: str) -> None:
    with contextlib.suppress(BadScope):
        scope = parse_scope(text)
        assert parse_scope(format_scope(scope)) == scope


@pytest.mark.parametrize(
    ("glob", "path", "yes"),
    [
        ("/v1/**", "/v1/a/b", True),
        ("/v1/**", "/v1/", True),
        ("/v1/**", "/v1", False),
        ("/v1/*", "/v1/a", True),
        ("/v1/*", "/v1/a/b", False),
        ("/v1/*", "/v1/", False),
        ("/*/list", "//list", False),
        ("/a*", "/a", True),
        ("/a.b", "/axb", False),
        ("/**", "/", True),
    ],
)
def test_path_globs(glob: str, path: str, yes: bool) -> None:  # noqa: FBT001
    assert covers(parse_scope(f"http:GET:http://api.example.com{glob}"), forward("GET", path)) is yes


def test_an_http_scope_is_for_its_method_scheme_host_and_port_alone() -> None:
    scope = parse_scope("http:GET:http://api.example.com/**")
    assert covers(scope, forward("GET", "/x"))
    assert not covers(scope, forward("POST", "/x"))
    assert not covers(scope, forward("GET", "/x", port=8080))
    assert not covers(scope, forward("GET", "/x", host="api.example.com.evil.example"))
    assert not covers(scope, forward("GET", "/x", host="xapi.example.com"))
    assert not covers(parse_scope("http:GET:https://api.example.com:80/**"), forward("GET", "/x"))
    assert not covers(scope, EgressRequest(Form.CONNECT, "CONNECT", "tls", "api.example.com", 80, ""))


def test_an_llm_scope_is_for_model_endpoints_alone() -> None:
    scope = parse_scope("llm:m*")
    assert covers(scope, model("m1"))
    assert not covers(scope, model("xm"))
    assert not covers(scope, model("m1", dialect=None))
    assert covers(scope, model("", dialect=Dialect.MODELS))
    assert not covers(scope, model("other", dialect=Dialect.MODELS))


@given(st.sampled_from(["GET", "POST"]), st.text(alphabet="/ab*.~;@", max_size=12).map(lambda text: "/" + text))
def test_the_scope_a_denial_names_would_have_allowed_it(method: str, path: str) -> None:
    if any(part.partition(";")[0] in (".", "..") for part in path.split("/")):
        return  # never gets as far as a request
    request = forward(method, path)
    scope = parse_scope(missing_scope(request))
    assert covers(scope, request) or "*" in path
    assert not covers(scope, forward(method, path + "x"))


@pytest.mark.parametrize(
    ("wide", "narrow", "yes"),
    [
        ("llm:*", "llm:a*", True),
        ("llm:a*", "llm:*", False),
        ("llm:a*b", "llm:axb", True),
        ("http:*:http://a/**", "http:GET:http://a/b/*", True),
        ("http:GET:http://a/**", "http:GET,POST:http://a/b", False),
        ("http:GET:http://a/b/*", "http:GET:http://a/b/**", False),
        ("http:GET:http://a/**", "http:GET:http://b/x", False),
        ("tls:a:443", "tls:a:443", True),
        ("fs:rw:/a", "fs:ro:/a/b", True),
        ("fs:ro:/a", "fs:rw:/a", False),
        ("fs:ro:/a", "fs:ro:/ab", False),
        ("mcp:s/*", "mcp:s/t", True),
        ("llm:*", "mcp:s/t", False),
    ],
)
def test_what_includes_what(wide: str, narrow: str, yes: bool) -> None:  # noqa: FBT001
    assert includes(parse_scope(wide), parse_scope(narrow)) is yes
