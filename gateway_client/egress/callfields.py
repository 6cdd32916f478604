"""Which fields, tools and sources of a model call go to the gateway, dialect by dialect. Pure.

An allow-list, for gateways route, identify, cache, mock and configure by body fields, and learn new ones with every
release: what no table here names is dropped, and the request says so. The tables hold what the official SDKs' types
document (openai 3.51, anthropic 2.8, the v1beta reference of Gemini) without what identifies, routes, runs a second
model or works elsewhere; and a few sampling fields that many gateways document.

A tool that the gateway or the provider runs acts outside of the sandbox, on nobody's grant, so it is taken out; a tool
that the *client* runs stays. A document or image that the provider is to fetch would carry data out by its URL: that is
refused, for taking it out would change what is asked.

Settings pass with what is in them, but for what names a model, a fallback or more of a body: some gateways and
providers pick a model there (Gemini's `routingConfig`), and others may. Schemas and conversations stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gateway_client.egress.bodyjson import BadCall
from gateway_client.egress.request import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

noted_max: Final = 16
note_chars_max: Final = 64

_SAMPLING: Final = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"})
_PENALTIES: Final = frozenset({"frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "n"})
_CACHED: Final = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"})
_TOOLS: Final = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_STREAM: Final = frozenset({"model", "stream", "stream_options"})

_MESSAGES: Final = _SAMPLING - {"seed", "stop"} | {
    "betas",
    "cache_control",
    "compaction",
    "context_management",
    "diagnostics",
    "max_tokens",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "speed",
    "stop_sequences",
    "stream",
    "system",
    "thinking",
    "tool_choice",
    "tools",
}

FIELDS: Final[Mapping[Dialect, frozenset[str]]] = {
    # Left out: metadata and user (whom the gateway takes the call for), moderation (another model), web_search_options.
    Dialect.OPENAI_CHAT: _SAMPLING
    | _PENALTIES
    | _CACHED
    | _TOOLS
    | _STREAM
    | {
        "audio",
        "function_call",
        "functions",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "modalities",
        "prediction",
        "reasoning",
        "reasoning_effort",
        "response_format",
        "service_tier",
        "store",
        "thinking",
        "top_logprobs",
        "verbosity",
    },
    # Left out, besides: background (it would run on when nobody meters it), prompt (kept at the provider: it may name
    # model and tools), access_programs.
    Dialect.OPENAI_RESPONSES: _SAMPLING
    | _CACHED
    | _TOOLS
    | _STREAM
    | {
        "context_management",
        "conversation",
        "image",
        "include",
        "input",
        "instructions",
        "max_output_tokens",
        "max_tool_calls",
        "previous_response_id",
        "reasoning",
        "service_tier",
        "store",
        "text",
        "top_logprobs",
        "truncation",
    },
    Dialect.OPENAI_COMPLETIONS: _SAMPLING
    | _PENALTIES
    | _STREAM
    | {"best_of", "echo", "max_tokens", "prompt", "suffix"},
    Dialect.OPENAI_EMBEDDINGS: frozenset({"dimensions", "encoding_format", "input", "model"}),
    # Left out: container and mcp_servers (they act elsewhere), fallbacks (other models), inference_geo, user_profile_id
    # and workspace_id (where and for whom), thread.
    Dialect.ANTHROPIC_MESSAGES: _MESSAGES,
    Dialect.ANTHROPIC_COUNT_TOKENS: _MESSAGES,
    # Left out: model (the path names it), cachedContent (made by others of the same key), labels.
    Dialect.GEMINI_GENERATE: frozenset(
        {
            "contents",
            "generationConfig",
            "generation_config",
            "safetySettings",
            "safety_settings",
            "systemInstruction",
            "system_instruction",
            "toolConfig",
            "tool_config",
            "tools",
        }
    ),
}

_CLIENT_TOOLS: Final = frozenset(
    {
        "apply_patch",
        "computer",
        "computer-preview",
        "computer_use",
        "computer_use_preview",
        "custom",
        "function",
        "local_shell",
        "namespace",
        "shell",
        "tool_search",
    }
)
"""Run by whoever called; `tool_search` only looks through the tools of the call itself."""
_ANTHROPIC_TOOLS: Final = re.compile(
    r"custom|function|(?:bash|text_editor|computer|memory|tool_search_tool_bm25|tool_search_tool_regex"
    r"|computer_toolset|browser_toolset)(?:_[0-9]{8})?"
)
_GEMINI_TOOLS: Final = frozenset({"functionDeclarations", "function_declarations", "computerUse", "computer_use"})
_LOCAL: Final[Mapping[str, Any]] = {"environment": {"type": "local"}}
_CHOICES: Final = frozenset({"auto", "none", "any", "tool", "allowed_tools"})

_CONTENT: Final[Mapping[Dialect, tuple[str, ...]]] = {
    Dialect.OPENAI_CHAT: ("messages", "prediction"),
    Dialect.OPENAI_RESPONSES: ("input",),
    Dialect.ANTHROPIC_MESSAGES: ("messages", "system"),
    Dialect.ANTHROPIC_COUNT_TOKENS: ("messages", "system"),
    Dialect.GEMINI_GENERATE: ("contents", "systemInstruction", "system_instruction"),
}
_TALK: Final = frozenset(
    {
        "contents",
        "input",
        "instructions",
        "messages",
        "prediction",
        "prompt",
        "suffix",
        "system",
        "systemInstruction",
        "system_instruction",
    }
)
_SCHEMAS: Final = frozenset(
    {
        "definition",
        "inputschema",
        "inputexamples",
        "jsonschema",
        "outputschema",
        "parameters",
        "parametersjsonschema",
        "properties",
        "response",
        "responseschema",
        "responsejsonschema",
        "schema",
    }
)
"""Where any key may stand for something of the agent's own..."""
_WITH_SCHEMAS: Final = frozenset(
    ("functions", "generationConfig", "generation_config", "output_config", "output_format", "response_format",
     "text", "tools")
)  # fmt: skip
"""...in these settings, which have such."""
_PICKS: Final = re.compile(r"model.*|.*models?|fallback.*|.*fallbacks?|extra(?:body|query|headers?)|routingconfig")
_SEPARATORS: Final = re.compile(r"[^a-z0-9]")

_NEVER_FETCHED: Final = frozenset(
    {"action", "actions", "annotations", "args", "arguments", "citations", "input", "parameters", "response", "results"}
)
"""What the model gave to a tool, and where it read something: a URL there is a text."""
_SOURCES: Final = frozenset(
    {
        "audio_url",
        "data",
        "file_data",
        "file_id",
        "file_uri",
        "file_url",
        "fileUri",
        "image_url",
        "uri",
        "url",
        "video_url",
    }
)
_TOLD: Final = re.compile(r".*_(?:call|call_output|result|result_error|tool_use)|tool_use")
"""Items that tell what a tool did or found: what they name themselves is fetched by nobody, what is in them may be."""
_URL: Final = re.compile(r"(?:https?|ftps?|file|gs|s3|wss?):|[a-z][a-z0-9+.-]{0,31}:[/\\]{2}", re.IGNORECASE)
_STRIPPED_BY_READERS: Final = "".join(map(chr, range(0x21)))


@dataclass(slots=True)
class Cleaned:
    """A call without what may not go out, and what that was."""

    document: dict[str, Any]
    dropped: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        if len(self.dropped) < noted_max:
            text = re.sub(r"[^A-Za-z0-9_.:-]", "?", what[:note_chars_max])
            if text not in self.dropped:
                self.dropped.append(text)


def clean(dialect: Dialect, document: dict[str, Any]) -> Cleaned:
    """Give a call that names only what may go out; raise BadCall where it would have something fetched."""
    allowed = FIELDS[dialect]
    cleaned = Cleaned({key: value for key, value in document.items() if key in allowed})
    for key in document:
        if key not in allowed:
            cleaned.note(key)
    metadata = cleaned.document.pop("metadata", None)
    if isinstance(metadata, dict) and isinstance(metadata.get("user_id"), str):
        cleaned.document["metadata"] = {"user_id": metadata["user_id"]}  # of the Anthropic dialect alone
    _clean_tools(dialect, cleaned)
    for name, value in cleaned.document.items():
        if name not in _TALK:
            _clean_setting(name, value, cleaned)
    for name in _CONTENT.get(dialect, ()):
        _look_through(dialect, cleaned.document.get(name))
    return cleaned


def _clean_setting(name: str, setting: object, cleaned: Cleaned) -> None:
    """Take out of a setting what may pick a model; the body was weighed before, so this is bounded."""
    todo, schemas = [setting], _SCHEMAS if name in _WITH_SCHEMAS else frozenset()
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            for key, each in list(value.items()):
                plain = _SEPARATORS.sub("", key.casefold())
                if plain in schemas:
                    continue
                if _PICKS.fullmatch(plain):
                    cleaned.note(f"{name}.{key}")
                    del value[key]
                elif type(each) in (dict, list):
                    todo.append(each)


# --- tools


def _clean_tools(dialect: Dialect, cleaned: Cleaned) -> None:
    document = cleaned.document
    tools = document.get("tools")
    if tools is None:
        return
    if not isinstance(tools, list):
        raise BadCall("body_malformed", "tools is no list")
    kept = []
    for tool in tools:
        passed = _gemini_tool(tool, cleaned) if dialect is Dialect.GEMINI_GENERATE else _tool(dialect, tool, cleaned)
        if passed is not None:
            kept.append(passed)
    if len(kept) < len(tools) and not kept:
        for name in ("tools", "tool_choice", "parallel_tool_calls", "toolConfig", "tool_config"):
            document.pop(name, None)
        return
    document["tools"] = kept
    if "tool_choice" in document and not _may_choose(dialect, document["tool_choice"], kept):
        cleaned.note("tool_choice")
        del document["tool_choice"]


def _tool(dialect: Dialect, tool: object, cleaned: Cleaned) -> object:
    if not isinstance(tool, dict):
        raise BadCall("body_malformed", "a tool is no object")
    kind = tool.get("type") or ("function" if "function" in tool or "name" in tool else "")
    if not isinstance(kind, str):
        raise BadCall("body_malformed", "the type of a tool is no text")
    if not _client_runs(dialect, kind, tool):
        cleaned.note(f"tool:{kind}")
        return None
    if kind == "namespace" and isinstance(tool.get("tools"), list):
        inner = [_tool(dialect, each, cleaned) for each in tool["tools"] if not _is_namespace(each)]
        return {**tool, "tools": [each for each in inner if each is not None]}
    return tool


def _client_runs(dialect: Dialect, kind: str, tool: Mapping[str, Any]) -> bool:
    if dialect in (Dialect.ANTHROPIC_MESSAGES, Dialect.ANTHROPIC_COUNT_TOKENS):
        return _ANTHROPIC_TOOLS.fullmatch(kind) is not None
    if kind == "shell":  # without an environment, or with any but the local one, the provider runs a container
        environment = tool.get("environment")
        return isinstance(environment, dict) and environment.get("type") == "local"
    return kind in _CLIENT_TOOLS


def _is_namespace(tool: object) -> bool:
    return isinstance(tool, dict) and tool.get("type") == "namespace"


def _gemini_tool(tool: object, cleaned: Cleaned) -> object:
    if not isinstance(tool, dict):
        raise BadCall("body_malformed", "a tool is no object")
    for name in tool:
        if name not in _GEMINI_TOOLS:
            cleaned.note(f"tool:{name}")
    return {name: value for name, value in tool.items() if name in _GEMINI_TOOLS} or None


def _may_choose(dialect: Dialect, choice: object, tools: list[Any]) -> bool:
    if isinstance(choice, str) or choice is None:
        return True
    if not isinstance(choice, dict):
        raise BadCall("body_malformed", "tool_choice is neither text nor object")
    kind = choice.get("type")
    if not isinstance(kind, str):
        return True
    if kind == "tool" and isinstance(choice.get("name"), str):  # of the Anthropic dialect: it may name one taken out
        return any(tool.get("name") == choice["name"] or tool.get("type") == "namespace" for tool in tools)
    if kind == "allowed_tools":
        inner = choice.get("allowed_tools") if isinstance(choice.get("allowed_tools"), dict) else choice
        listed = inner.get("tools") if isinstance(inner, dict) else None
        return isinstance(listed, list) and all(
            isinstance(each, dict) and _client_runs(dialect, str(each.get("type", "")), _LOCAL) for each in listed
        )
    return kind in _CHOICES or _client_runs(dialect, kind, _LOCAL)


# --- what is inside of the conversation


def _look_through(dialect: Dialect, content: object) -> None:
    """Look through messages and their parts for sources that are URLs and for tools that were added on the way.

    The body was weighed before, so this is bounded.
    """
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += [each for each in value if type(each) in (dict, list)]
        elif isinstance(value, dict):
            kind = value.get("type")
            told = isinstance(kind, str) and (kind == "text" or _TOLD.fullmatch(kind) is not None)
            for key, each in value.items():
                if isinstance(each, str):
                    if key in _SOURCES and not told and _is_url(each):
                        raise BadCall(
                            "source_by_url",
                            f"{key} names a URL that the gateway or provider would fetch; send the data itself",
                            status=403,
                        )
                elif type(each) in (dict, list) and key not in _NEVER_FETCHED:
                    if key in ("tool", "tools"):
                        _refuse_added(dialect, each if isinstance(each, list) else [each])
                    todo.append(each)


def _is_url(text: str) -> bool:
    """Tell whether it is a URL to a reader that strips and drops what the URL standard does."""
    plain = text.lstrip(_STRIPPED_BY_READERS)
    return _URL.match(plain.replace("\n", "").replace("\r", "").replace("\t", "")) is not None


def _refuse_added(dialect: Dialect, tools: list[Any]) -> None:
    if dialect is Dialect.GEMINI_GENERATE:
        return
    for tool in tools:
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if isinstance(kind, str) and not _client_runs(dialect, kind, tool):
            raise BadCall("tool_refused", f"a tool of type {kind[:note_chars_max]} acts elsewhere", status=403)
