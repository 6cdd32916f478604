"""Guardrails: what is found wherever it is split, what is left alone, and streams that stay valid."""

from __future__ import annotations

import json
import string
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_client.egress.request import Dialect
from gateway_client.gateways import sse
from gateway_client.gateways.guardrails import builtin, document
from gateway_client.gateways.guardrails.events import KINDS, Events, TooMany, whole_answer
from gateway_client.gateways.guardrails.pattern import BadPattern, Pattern, read_pieces
from gateway_client.gateways.guardrails.rules import Action, Direction, Rule, Rules, patterns_of
from gateway_client.gateways.guardrails.window import JsonText, Patterns, Window, masked

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL = Patterns((*builtin.PII, *builtin.SECRETS))
LETTERS = string.ascii_letters + string.digits
FORTY = (LETTERS * 2)[7:47]
PEM_BODY = "\n".join([(LETTERS + "+/")[:64]] * 4)

# Numbers of public examples: card schemes' test cards, ISO 13616's IBANs, the tax offices' own samples.
FOUND = [
    ("email", "bob.smith+tag@mail.example.co.uk"),
    ("phone", "+49 30 1234567"),
    ("phone", "(212) 555-0100".replace("555", "455")),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555-5555-5555-4444"),
    ("card", "378282246310005"),
    ("card", "6011111111111117"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"),
    ("us_ssn", "123-45-6789"),
    ("es_dni", "12345678Z"),
    ("fr_nir", "2 55 08 14 168 025 38"),
    ("it_cf", "RSSMRA85T10A562S"),
    ("br_cpf", "111.444.777-35"),
    ("private_key", f"-----BEGIN RSA PRIVATE KEY-----\n{PEM_BODY}\n-----END RSA PRIVATE KEY-----"),
    ("private_key", f"-----BEGIN PRIVATE KEY-----\\n{FORTY}\\n-----END PRIVATE KEY-----"),
    ("jwt", f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{FORTY}"),
    ("aws_key", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("aws_key", "aws_secret_access_key = " + FORTY),
    ("github_token", "ghp_" + FORTY),
    ("github_token", f"github_pat_{FORTY[:22]}_{(FORTY * 2)[:59]}"),
    ("gitlab_token", "glpat-" + FORTY[:20]),
    ("slack_token", "xoxb-123456789012-" + FORTY),
    ("slack_token", "xapp-1-A012345-" + FORTY),
    ("google_key", "AIza" + FORTY[:35]),
    ("stripe_key", "sk_live_" + FORTY[:24]),
    ("openai_key", "sk-proj-" + FORTY),
    ("anthropic_key", "sk-ant-api03-" + FORTY),
    ("npm_token", "npm_" + FORTY[:36]),
    ("pypi_token", "pypi-AgEIcHlwaS5vcmc" + FORTY * 2),
    ("huggingface_token", "hf_" + FORTY[:34]),
    ("sendgrid_key", f"SG.{FORTY[:22]}.{(FORTY * 2)[:43]}"),
    ("digitalocean_token", "dop_v1_" + "0a" * 32),
]
LEFT_ALONE = [
    "4111 1111 1111 1112",  # Luhn
    "1234 5678 9012 3452",  # no issuer
    "DE89 3704 0044 0532 0130 01",  # modulo 97
    "ZZ89370400440532013000",
    "666-45-6789",
    "12345678A",
    "2 55 08 14 168 025 39",
    "RSSMRA85T10A562T",
    "111.444.777-36",
    "111.111.111-11",
    "me@localhost",
    "@property def x(self)",
    "AKIA is a prefix",
    "ghp_short",
    "sk-learn is a library",
    "eyJ.eyJ.x",
    "-----BEGIN PUBLIC KEY-----\n" + PEM_BODY,
    "0.4111111111111111",
    "x4111111111111111",
    "version 1.2.3+20260101",
    "The quick brown fox jumps over 13 lazy dogs, 2026-11-26T20:28:48Z.",
]
TEXTS = st.text(alphabet=string.ascii_letters + string.digits + " .,:;-_/+@{}[]()\n", max_size=40)


def shown(text: str) -> tuple[str, Counter[str]]:
    found: Counter[str] = Counter()
    return masked(ALL, text, found), found


def streamed(text: str, cuts: Sequence[int]) -> tuple[str, Counter[str]]:
    window = Window(ALL)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    out = "".join(window.feed(text[a:b]) for a, b in pairwise(places)) + window.end()
    return out, window.found


@pytest.mark.parametrize(("name", "text"), FOUND)
def test_each_is_found_and_nothing_around_it_changes(name: str, text: str) -> None:
    for before, after in (("", ""), ("see ", " there"), ('"', '",'), ("(", ")."), ("\\n", "\\n"), ("=", "\n")):
        assert shown(before + text + after) == (f"{before}[masked:{name}]{after}", Counter({name: 1}))


@pytest.mark.parametrize(("name", "text"), FOUND)
def test_each_is_found_split_at_every_position(name: str, text: str) -> None:
    whole = f"key: {text}, end"
    expected = (f"key: [masked:{name}], end", Counter({name: 1}))
    for cut in range(len(whole) + 1):
        assert streamed(whole, [cut]) == expected
    assert streamed(whole, range(len(whole))) == expected, "a character at a time"


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_only_looks_like_one_is_left_alone(text: str) -> None:
    assert shown(f"see {text} there") == (f"see {text} there", Counter())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(TEXTS | st.sampled_from([text for _, text in FOUND]) | st.sampled_from(LEFT_ALONE), max_size=6).map(
        "".join
    ),
    st.lists(st.integers(0, 10_000), max_size=20),
)
def test_a_stream_gives_the_same_as_the_whole_however_it_is_split(texts: list[str], cuts: list[int]) -> None:
    text = "".join(texts)
    assert streamed(text, cuts) == shown(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=string.ascii_lowercase + " .,!?\n'\"äß…", max_size=200), st.lists(st.integers(0, 200)))
def test_text_without_a_match_passes_unchanged(text: str, cuts: list[int]) -> None:
    assert streamed(text, cuts) == (text, Counter())


def test_prose_is_held_back_for_a_word_at_most() -> None:
    window = Window(ALL)
    out = window.feed("The answer to your question is ")
    assert len(out) >= len("The answer to your question is") - 1
    assert window.feed("x" * 300).endswith("x"), "a word too long for any pattern goes on"


def test_what_is_held_back_is_bounded() -> None:
    window = Window(ALL)
    given_chars = 0
    shown_chars = len(window.feed("-----BEGIN PRIVATE KEY-----"))
    for _ in range(60):
        given_chars += 1000
        shown_chars += len(window.feed("AbC4" * 250))
        assert given_chars - shown_chars <= ALL.longest + 1000 or window.found


def test_arguments_stay_json_whatever_is_masked() -> None:
    cases: list[Any] = [
        {"card": 4111111111111111, "text": "mail a@example.com\nghp_" + FORTY},
        {"path": "C:\\new\\bob@example.com", "quoted": 'say "bob@example.com"'},
        {"key": f"-----BEGIN PRIVATE KEY-----\n{FORTY}\n", "then": "kept"},
    ]
    for case in cases:
        text = json.dumps(case)
        for cut in range(len(text)):
            window = Window(ALL, JsonText())
            out = window.feed(text[:cut]) + window.feed(text[cut:]) + window.end()
            value = json.loads(out)
            assert value.keys() == case.keys()
            assert "example.com" not in out
            assert "4111111111111111" not in out
            assert FORTY not in out
            assert value.get("then", "kept") == "kept"


# --- documents


def test_documents_are_masked_in_every_text_and_ids_stay() -> None:
    secret = "AKIA" + "IOSFODNN7EXAMPLE"
    found: Counter[str] = Counter()
    value = {
        "model": "m", "id": secret,
        "messages": [{"role": "user", "content": [{"type": "text", "text": f"x {secret}"}]}],
        "tools": [{"function": {"arguments": json.dumps({"k": secret}), "n": 4111111111111111}}],
        secret: True,
    }  # fmt: skip
    changed = document.mask(value, ALL, found)
    assert found == Counter({"aws_key": 3, "card": 1})
    assert changed["id"] == secret
    assert json.dumps(changed).count(secret) == 1
    assert json.loads(changed["tools"][0]["function"]["arguments"]) == {"k": "[masked:aws_key]"}


def test_a_document_without_a_match_is_the_same() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "text"}], "n": 10**20}
    found: Counter[str] = Counter()
    assert document.mask(json.loads(json.dumps(value)), ALL, found) == value
    assert not found


def test_a_deep_document_is_no_recursion() -> None:
    deep: Any = "bob@example.com"
    for _ in range(50_000):
        deep = [deep]
    found: Counter[str] = Counter()
    document.mask(deep, ALL, found)
    assert found["email"] == 1


# --- streams of events


def chat(texts: list[str], arguments: list[str]) -> list[dict[str, Any]]:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"id": "c", "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    call = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": ""}}
    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": text}) for text in texts),
        chunk({"tool_calls": [call]}),
        *(chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]}) for text in arguments),
        chunk({}, "tool_calls"),
        {"id": "c", "choices": [], "usage": {"prompt_tokens": 1}},
    ]


def messages(texts: list[str], arguments: list[str]) -> list[dict[str, Any]]:
    def delta(index: int, value: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": value}

    tool = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    return [
        {"type": "message_start", "message": {"content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(delta(0, {"type": "text_delta", "text": text}) for text in texts),
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": tool},
        *(delta(1, {"type": "input_json_delta", "partial_json": text}) for text in arguments),
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]


def responses(texts: list[str], arguments: list[str]) -> list[dict[str, Any]]:
    text, call = "".join(texts), "".join(arguments)
    place, second = {"item_id": "m", "output_index": 0, "content_index": 0}, {"item_id": "f", "output_index": 1}
    output = [{"content": [{"type": "output_text", "text": text, "logprobs": [{"token": "x"}]}]}, {"arguments": call}]
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"output": [], "instructions": "mail boss@example.com"}},
        *({"type": "response.output_text.delta", **place, "delta": piece, "logprobs": [1]} for piece in texts),
        {"type": "response.output_text.done", **place, "text": text},
        *({"type": "response.function_call_arguments.delta", **second, "delta": piece} for piece in arguments),
        {"type": "response.function_call_arguments.done", **second, "arguments": call},
        {"type": "response.completed", "response": {"output": output, "instructions": "mail boss@example.com"}},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


MAKE = {
    Dialect.OPENAI_CHAT: chat,
    Dialect.ANTHROPIC_MESSAGES: messages,
    Dialect.OPENAI_RESPONSES: responses,
}


def passed(dialect: Dialect, events: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Events]:
    guard = KINDS[dialect](ALL)
    splitter = sse.Splitter()
    raw = b"".join(sse.encode(json.dumps(event).encode(), name=event.get("type", "")) for event in events)
    if dialect is Dialect.OPENAI_CHAT:
        raw += b"data: [DONE]\n\n"
    out = b"".join(guard.event(event) for event in splitter.feed(raw)) + guard.end()
    shown = [event for event in sse.Splitter().feed(out) if event.data != b"[DONE]"]
    return [json.loads(event.data) for event in shown], guard


def texts_of(dialect: Dialect, events: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the text and the arguments that a client of the dialect puts together."""
    text, call = "", ""
    for event in events:
        match dialect, event:
            case Dialect.OPENAI_CHAT, {"choices": [{"delta": delta}]}:
                text += delta.get("content") or ""
                call += "".join(each["function"]["arguments"] for each in delta.get("tool_calls", ()))
            case Dialect.ANTHROPIC_MESSAGES, {"delta": {"text": piece}}:
                text += piece
            case Dialect.ANTHROPIC_MESSAGES, {"delta": {"partial_json": piece}}:
                call += piece
            case Dialect.OPENAI_RESPONSES, {"type": "response.output_text.delta", "delta": piece}:
                text += piece
            case Dialect.OPENAI_RESPONSES, {"type": "response.function_call_arguments.delta", "delta": piece}:
                call += piece
            case _:
                pass
    return text, call


@pytest.mark.parametrize("dialect", MAKE)
def test_a_secret_over_two_deltas_is_found_in_text_and_arguments(dialect: Dialect) -> None:
    text = "my key is ghp_" + FORTY
    call = json.dumps({"to": "bob@example.com", "n": 4111111111111111})
    for cut in range(max(len(text), len(call)) + 1):
        made = MAKE[dialect]([text[:cut], text[cut:]], [call[:cut], call[cut:]])
        events, guard = passed(dialect, made)
        assert texts_of(dialect, events) == (
            "my key is [masked:github_token]",
            json.dumps({"to": "[masked:email]", "n": 10**15}),
        )
        assert guard.found == Counter({"github_token": 1, "email": 1, "card": 1})
        assert FORTY not in json.dumps(events)
        if dialect is Dialect.OPENAI_RESPONSES:
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert events[-1]["type"] == "response.completed"
            assert events[-1]["response"]["output"][0]["content"][0]["text"] == "my key is [masked:github_token]"
            assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == []
            assert events[-1]["response"]["instructions"] == "mail boss@example.com", "the agent's own words"


@pytest.mark.parametrize("dialect", MAKE)
@given(st.lists(st.text(string.ascii_lowercase + " ,.\n", max_size=12), max_size=8))
def test_events_without_a_match_say_the_same(dialect: Dialect, pieces: list[str]) -> None:
    events, guard = passed(dialect, MAKE[dialect](pieces, ["{}"]))
    assert texts_of(dialect, events) == ("".join(pieces), "{}")
    assert not guard.found


@pytest.mark.parametrize("data", [b"{", b"[1]", b"7", b'{"choices":[1]}'])
def test_a_stream_that_cannot_be_looked_through_is_not_passed(data: bytes) -> None:
    with pytest.raises(TooMany):
        KINDS[Dialect.OPENAI_CHAT](ALL).event(sse.Event("", data, b"data: %b\n\n" % data))
    with pytest.raises(TooMany):
        KINDS[Dialect.OPENAI_CHAT](ALL).event(sse.Event("", b"", b"", cut=True))


def test_logprobs_do_not_say_again_what_is_masked() -> None:
    found: Counter[str] = Counter()
    value = {"choices": [{"message": {"content": "hi"}, "logprobs": {"content": [{"token": "hi"}]}}]}
    assert whole_answer(value, ALL, found)["choices"][0]["logprobs"] is None


# --- patterns and rules


@pytest.mark.parametrize("text", ["", "a*", "(a)", "a|b", "[^a]", "[a", "a{3,1}", "a{0}", "a?b?",
                                  '"x', '["-~]', "[!-~]x", "a{99999}", "x" * 97, "\\"])  # fmt: skip
def test_a_pattern_outside_of_the_language_is_refused(text: str) -> None:
    with pytest.raises(BadPattern):
        read_pieces(text)


def test_a_pattern_at_the_limit_works() -> None:
    pattern = Pattern("long", "a" * 96)
    window = Window(Patterns([pattern]))
    assert window.feed("a" * 95) == ""
    assert window.feed("a ") == "[masked:long] "


def test_blocking_wins_where_two_rules_have_one_pattern() -> None:
    both = frozenset(Direction)
    rules = Rules(
        [
            Rule("soft", both, Action.MASK, patterns_of(["pii"])),
            Rule("hard", frozenset({Direction.REQUEST}), Action.BLOCK, patterns_of(["email"]), ("gpt-*",)),
        ]
    )
    guard = rules.guard("gpt-x", Direction.REQUEST)
    assert guard is not None
    verdict = guard.verdict(Counter({"email": 2, "card": 1}))
    assert verdict is not None
    assert (verdict.action, verdict.rules, verdict.patterns) == (Action.BLOCK, ("hard",), {"email": 2})
    for model, direction in (("gpt-x", Direction.RESPONSE), ("claude", Direction.REQUEST)):
        guard = rules.guard(model, direction)
        assert guard is not None
        assert not guard.blocks(Counter({"email": 2}))
    assert Rules([Rule("r", both, Action.MASK, patterns_of(["pii"]), ("a",))]).guard("b", Direction.REQUEST) is None


def test_unknown_pattern_names_the_known() -> None:
    with pytest.raises(LookupError, match="pii, secrets, email"):
        patterns_of(["e-mail"])
