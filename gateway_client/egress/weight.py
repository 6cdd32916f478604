"""How much a model call may use, before it is made: what a budget sets aside for it. Pure.

Nobody outside of the provider can count tokens exactly, so what is set aside errs on the high side: every limit a call
names is read and the largest counts, times the answers it asks for; of its text every two bytes are a token, where
prose and code have three to four bytes to one. Data in base64 is no text: a picture or page is some thousand tokens
however many bytes it has.
"""

from __future__ import annotations

from typing import Any, Final

from gateway_client.egress.bodyjson import BadCall
from gateway_client.egress.request import Dialect

max_tokens_max: Final = 100_000_000
choices_max: Final = 2048
"""Answers to one call: prompts of a completion times `n`."""
bytes_per_token: Final = 2
blob_bytes_min: Final = 4096
"""A source longer than this that looks like base64 is data."""
bytes_per_blob_token: Final = 128
tokens_per_blob_min: Final = 2048

_BLOB_KEYS: Final = frozenset({"data", "file_data", "image_url", "url"})


def output_tokens_of(dialect: Dialect, document: dict[str, Any]) -> int | None:
    """Give the most tokens one answer may have as the call says, or None where it does not say; raise BadCall."""
    if dialect is Dialect.OPENAI_EMBEDDINGS:
        return 0
    wheres = [document]
    names: tuple[str, ...] = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    if dialect is Dialect.GEMINI_GENERATE:
        wheres, names = _configurations(document), ("maxOutputTokens", "max_output_tokens")
    said = [_tokens(where, name) for where in wheres for name in names]
    named = [each for each in said if each is not None]
    thinking = [_tokens(value, key) or 0 for where in wheres for value, key in _thinking(where)]
    return max(named + thinking) if named else None


def choices_of(dialect: Dialect, document: dict[str, Any]) -> int:
    """Give how many answers are made for a call; raise BadCall where that is no such number."""
    if dialect is Dialect.GEMINI_GENERATE:
        names = ("candidateCount", "candidate_count")
        return max([_choices(where, name) for where in _configurations(document) for name in names], default=1)
    count = max(_choices(document, "n"), _choices(document, "best_of"))
    prompts = document.get("prompt")
    if (
        dialect is Dialect.OPENAI_COMPLETIONS
        and isinstance(prompts, list)
        and not all(type(each) is int for each in prompts)
    ):
        count *= max(len(prompts), 1)
    if count > choices_max:
        raise BadCall("body_malformed", f"the call asks for over {choices_max} answers")
    return count


def input_tokens_of(document: dict[str, Any], body_bytes: int) -> int:
    """Give an upper estimate of the tokens a call puts in."""
    text_bytes, blob_tokens = body_bytes, 0
    for size in _blobs(document):
        text_bytes -= size
        blob_tokens += max(size // bytes_per_blob_token, tokens_per_blob_min)
    return max(text_bytes, 0) // bytes_per_token + blob_tokens


def _blobs(document: dict[str, Any]) -> list[int]:
    sizes = []
    todo: list[Any] = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += [each for each in value if type(each) in (dict, list)]
            continue
        for key, each in value.items():
            if type(each) in (dict, list):
                todo.append(each)
            elif key in _BLOB_KEYS and isinstance(each, str) and len(each) > blob_bytes_min and _is_blob(each):
                sizes.append(len(each))
    return sizes


def _is_blob(text: str) -> bool:
    return text.isascii() and not any(mark in text for mark in (" ", '"', "{", "\\"))


def _configurations(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the generation configuration in both spellings: which of two a gateway takes is its own affair."""
    found = []
    for name in ("generationConfig", "generation_config"):
        value = document.get(name)
        if value is not None and not isinstance(value, dict):
            raise BadCall("body_malformed", f"{name} is no object")
        if value is not None:
            found.append(value)
    return found


def _thinking(where: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    found = []
    for name, keys in (
        ("thinking", ("budget_tokens",)),
        ("reasoning", ("max_tokens",)),
        ("thinkingConfig", ("thinkingBudget", "thinking_budget")),
        ("thinking_config", ("thinkingBudget", "thinking_budget")),
    ):
        value = where.get(name)
        if isinstance(value, dict):
            found += [(value, key) for key in keys if value.get(key) != -1]  # -1: as much as the model likes
    return found


def _tokens(where: dict[str, Any], name: str) -> int | None:
    value = where.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= max_tokens_max:
        raise BadCall("body_malformed", f"{name} is no number of tokens")
    return value


def _choices(where: dict[str, Any], name: str) -> int:
    value = where.get(name)
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= choices_max:
        raise BadCall("body_malformed", f"{name} is no number of answers")
    return value
