"""What an agent wrote, shown to a person: one line, nothing that drives the terminal, one text for one showing."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from supervisord.actions.encoding import to_text
from supervisord.actions.escape import shown


def test_plain_text_is_shown_as_it_is() -> None:
    assert shown("GET https://a.example/v1?x=1 grüß 中文") == "GET https://a.example/v1?x=1 grüß 中文"


def test_terminal_and_line_tricks_are_written_out() -> None:
    assert shown("\x1b[2Ja\r\nb\t") == "\\x1b[2Ja\\x0d\\x0ab\\x09"
    assert shown("\x9b31m") == "\\x9b31m"
    assert shown("user\u202etxt.exe\u200b\u2028") == "user\\u202etxt.exe\\u200b\\u2028"
    assert shown(to_text(b"\xff\xfe")) == "\\xff\\xfe"
    assert shown("\U000e0041a\u0300\u00a0") == "\\U000e0041a\\u0300\\xa0"
    assert shown("\\x1b") == "\\\\x1b"


def test_long_text_is_cut() -> None:
    assert shown("x" * 10, 10) == "x" * 10
    assert shown("x" * 11, 10) == "x" * 10 + "…"
    assert len(shown("\x1b" * 100, 10)) <= 11


@given(st.binary(max_size=60), st.text(max_size=40))
def test_nothing_unsafe_is_ever_shown(data: bytes, text: str) -> None:
    for character in shown(to_text(data) + text):
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@given(st.text(max_size=12), st.text(max_size=12))
def test_two_texts_are_never_shown_alike(one: str, two: str) -> None:
    assert (shown(one) == shown(two)) == (one == two)
