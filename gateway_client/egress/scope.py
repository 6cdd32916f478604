"""Scopes: the text an operator grants, as typed values, and what each covers. Pure.

`llm:MODEL-GLOB` · `http:GET,POST:http://host/v1/**` · `tls:HOST:PORT` · `fs:ro:/host/path[=/in/agent]` ·
`mcp:SERVER/TOOL-GLOB`. A host is one exact name: a wildcard there would carry an agent's data out in DNS look-ups.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Final, assert_never

from gateway_client.egress.mcpcall import SESSION, glob_covers
from gateway_client.egress.request import Dialect, EgressRequest, Form
from gateway_client.egress.target import Authority, BadTarget, default_port, normalise_path, parse_authority

scope_chars_max: Final = 2048
methods_count_max: Final = 16

_METHOD: Final = re.compile(r"[A-Z]{1,20}")
_MODEL_GLOB: Final = re.compile(r"[A-Za-z0-9._:/@+*-]{1,200}")
_SERVER: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_TOOL_GLOB: Final = re.compile(r"[A-Za-z0-9._/*-]{1,200}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class BadScope(ValueError):  # noqa: N818 - named for what it says
    """A text that is no scope; the message says what is wrong with it and what to write."""


@dataclass(frozen=True, slots=True)
class LlmScope:
    model_glob: str


@dataclass(frozen=True, slots=True)
class HttpScope:
    methods: tuple[str, ...]
    """Sorted; `("*",)` for any."""
    scheme: str
    host: str
    port: int
    path_glob: str


@dataclass(frozen=True, slots=True)
class TlsScope:
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class FsScope:
    writable: bool
    host_path: PurePosixPath
    inside: PurePosixPath | None


@dataclass(frozen=True, slots=True)
class McpScope:
    server: str
    tool_glob: str


Scope = LlmScope | HttpScope | TlsScope | FsScope | McpScope


def parse_scope(text: str) -> Scope:
    """Read one scope; raise BadScope with the cause and the form to write."""
    if len(text) > scope_chars_max or _CONTROL.search(text):
        raise BadScope(f"cannot read scope: it is longer than {scope_chars_max} characters or has control characters")
    kind, colon, rest = text.partition(":")
    if colon:
        match kind:
            case "llm":
                return _parse_llm(rest)
            case "http":
                return _parse_http(rest)
            case "tls":
                return _parse_tls(rest)
            case "fs":
                return _parse_fs(rest)
            case "mcp":
                return _parse_mcp(rest)
            case _:
                pass
    raise BadScope(f"cannot read scope {text!r}: it starts with none of llm: http: tls: fs: mcp:")


def _parse_llm(rest: str) -> LlmScope:
    if not _MODEL_GLOB.fullmatch(rest):
        raise BadScope(
            f"cannot read scope 'llm:{rest}': write llm:MODEL or llm:PREFIX* with letters, digits and ._:/@+-"
        )
    return LlmScope(model_glob=rest)


def _parse_http(rest: str) -> HttpScope:
    def bad(cause: str) -> BadScope:
        return BadScope(f"cannot read scope 'http:{rest}': {cause}; write http:GET,POST:https://host/path/**")

    names, colon, url = rest.partition(":")
    methods = names.split(",")
    if not colon or len(methods) > methods_count_max:
        raise bad("it lacks the methods or has too many")
    if methods != ["*"] and not all(_METHOD.fullmatch(method) for method in methods):
        raise bad("a method is upper-case letters, or * for any")
    if "CONNECT" in methods or "TRACE" in methods:
        raise bad("CONNECT and TRACE are no methods of an http: scope")
    scheme, separator, tail = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise bad("the URL starts with neither http:// nor https://")
    host, slash, path = tail.partition("/")
    if not slash:
        raise bad("the URL has no path; /** means every path")
    if "*" in host:
        raise bad("the host must be one exact name: a wildcard there lets data out in name look-ups")
    try:
        authority = parse_authority(host, default=default_port(scheme))
        path_glob = normalise_path("/" + path)
    except BadTarget as error:
        raise bad(str(error)) from error
    if "***" in path_glob:
        raise bad("only * and ** are wildcards")
    return HttpScope(
        methods=tuple(sorted(set(methods))),
        scheme=scheme,
        host=authority.host,
        port=authority.port,
        path_glob=path_glob,
    )


def _parse_tls(rest: str) -> TlsScope:
    if "*" in rest:
        raise BadScope(f"cannot read scope 'tls:{rest}': the host must be one exact name; write tls:HOST:PORT")
    try:
        authority = parse_authority(rest, default=None)
    except BadTarget as error:
        raise BadScope(f"cannot read scope 'tls:{rest}': {error}; write tls:HOST:PORT") from error
    return TlsScope(host=authority.host, port=authority.port)


def _parse_fs(rest: str) -> FsScope:
    mode, colon, paths = rest.partition(":")
    host_text, equals, inside_text = paths.partition("=/")
    inside = "/" + inside_text if equals else None
    if not colon or mode not in ("ro", "rw"):
        raise BadScope(f"cannot read scope 'fs:{rest}': write fs:ro:/host/path or fs:rw:/host/path[=/in/agent]")
    for path in (host_text, inside):
        if path is not None and (
            not path.startswith("/") or str(PurePosixPath(path)) != path or ".." in path.split("/")
        ):
            raise BadScope(
                f"cannot read scope 'fs:{rest}': {path!r} must be absolute and plain (no .., no doubled slash)"
            )
    return FsScope(
        writable=mode == "rw",
        host_path=PurePosixPath(host_text),
        inside=PurePosixPath(inside) if inside is not None else None,
    )


def _parse_mcp(rest: str) -> McpScope:
    server, slash, tool = rest.partition("/")
    if not slash or not _SERVER.fullmatch(server) or not _TOOL_GLOB.fullmatch(tool):
        raise BadScope(f"cannot read scope 'mcp:{rest}': write mcp:SERVER/TOOL or mcp:SERVER/PREFIX*")
    return McpScope(server=server, tool_glob=tool)


def format_scope(scope: Scope) -> str:
    """Give the canonical text of a scope, which `parse_scope` reads back to the same value."""
    match scope:
        case LlmScope():
            return f"llm:{scope.model_glob}"
        case HttpScope():
            authority = Authority(host=scope.host, port=scope.port).url_form(scope.scheme)
            return f"http:{','.join(scope.methods)}:{scope.scheme}://{authority}{scope.path_glob}"
        case TlsScope():
            return f"tls:{Authority(host=scope.host, port=scope.port)}"
        case FsScope():
            inside = f"={scope.inside}" if scope.inside is not None else ""
            return f"fs:{'rw' if scope.writable else 'ro'}:{scope.host_path}{inside}"
        case McpScope():
            return f"mcp:{scope.server}/{scope.tool_glob}"
        case _:
            assert_never(scope)


def covers(scope: Scope, request: EgressRequest) -> bool:
    """Whether a scope allows a request; fs: scopes cover no egress request."""
    match scope:
        case LlmScope():
            if request.form is not Form.MODEL or request.dialect is None:
                return False
            # A list of models is no use of a model: any llm: scope allows it.
            return (request.dialect is Dialect.MODELS and not request.model) or glob_match(
                scope.model_glob, request.model
            )
        case HttpScope():
            return (
                request.form is Form.FORWARD
                and (request.scheme, request.host, request.port) == (scope.scheme, scope.host, scope.port)
                and (scope.methods == ("*",) or request.method in scope.methods)
                and _path_regex(scope.path_glob).fullmatch(request.path) is not None
            )
        case TlsScope():
            # What is in the tunnel too, where it is looked into for the sake of an http: scope of the same host.
            inside = request.form is Form.FORWARD and request.scheme == "https"
            return (request.form is Form.CONNECT or inside) and (request.host, request.port) == (scope.host, scope.port)
        case McpScope():
            return (
                request.form is Form.MCP
                and scope.server == request.server
                and (
                    request.rpc_method in SESSION or (bool(request.tool) and glob_covers(scope.tool_glob, request.tool))
                )
            )
        case FsScope():
            return False
        case _:
            assert_never(scope)


def missing_scope(request: EgressRequest) -> str:  # noqa: PLR0911 - one for each form
    """Give the narrowest scope that would allow a request, as text for `grant`; empty where no scope can."""
    authority = request.authority
    match request.form:
        case Form.MODEL:
            if request.dialect is None:
                return ""
            return f"llm:{request.model or '*'}"
        case Form.FORWARD:
            path = request.path.replace("*", "%2A")
            return f"http:{request.method}:{request.scheme}://{authority.url_form(request.scheme)}{path}"
        case Form.CONNECT:
            return f"tls:{authority}"
        case Form.NAME:
            return f"tls:{request.host}:443"
        case Form.MCP:
            return f"mcp:{request.server}/{_tool_text(request)}"
        case Form.SELF:
            return ""
        case _:
            assert_never(request.form)


def _tool_text(request: EgressRequest) -> str:
    """Give the narrowest glob that covers a name; characters that no glob has become `*`."""
    return re.sub(r"[^A-Za-z0-9._/-]+", "*", request.tool)[:200] or "*"


def includes(wide: Scope, narrow: Scope) -> bool:
    """Whether everything `narrow` allows, `wide` allows too; False where that cannot be shown."""
    match wide, narrow:
        case LlmScope(), LlmScope():
            return _glob_includes(wide.model_glob, narrow.model_glob)
        case HttpScope(), HttpScope():
            return (
                (wide.scheme, wide.host, wide.port) == (narrow.scheme, narrow.host, narrow.port)
                and (wide.methods == ("*",) or set(narrow.methods) <= set(wide.methods))
                and _path_includes(wide.path_glob, narrow.path_glob)
            )
        case TlsScope(), TlsScope():
            return wide == narrow
        case FsScope(), FsScope():
            return (wide.writable or not narrow.writable) and narrow.host_path.is_relative_to(wide.host_path)
        case McpScope(), McpScope():
            kinds = [
                next((kind for kind in ("resources/", "prompts/") if scope.tool_glob.startswith(kind)), "")
                for scope in (wide, narrow)
            ]
            return (
                wide.server == narrow.server
                and kinds[0] == kinds[1]
                and _glob_includes(wide.tool_glob, narrow.tool_glob)
            )
        case _:
            return False


def glob_match(glob: str, text: str) -> bool:
    """Whether a glob of `*` (any characters, none too) matches the whole text, case and all."""
    return _glob_regex(glob).fullmatch(text) is not None


def _glob_includes(wide: str, narrow: str) -> bool:
    if "*" not in narrow:
        return glob_match(wide, narrow)
    prefix, star, rest = wide.partition("*")
    return wide == narrow or (star == "*" and not rest and narrow.partition("*")[0].startswith(prefix))


def _path_includes(wide: str, narrow: str) -> bool:
    if "*" not in narrow:
        return _path_regex(wide).fullmatch(narrow) is not None
    prefix, stars, rest = wide.partition("**")
    return wide == narrow or (
        stars == "**" and not rest and "*" not in prefix and narrow.partition("*")[0].startswith(prefix)
    )


@lru_cache(maxsize=4096)
def _glob_regex(glob: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in re.split(r"\*+", glob)), re.DOTALL)


@lru_cache(maxsize=4096)
def _path_regex(glob: str) -> re.Pattern[str]:
    """Compile a path glob: `**` any characters, `*` any within a segment, and at least one where it is a whole segment.

    The last part matters where a server merges slashes: `/*/list` must not match `//list`.
    """
    parts: list[str] = []
    position = 0
    for match in re.finditer(r"\*\*|\*", glob):
        parts.append(re.escape(glob[position : match.start()]))
        position = match.end()
        if match.group() == "**":
            parts.append(".*")
        else:
            whole = glob[match.start() - 1] == "/" and glob[position : position + 1] in ("", "/")
            parts.append("[^/]+" if whole else "[^/]*")
    parts.append(re.escape(glob[position:]))
    return re.compile("".join(parts), re.DOTALL)
