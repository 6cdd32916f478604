"""YAML with positions: what is refused, where, and that nothing crashes."""

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from supervisord.documents import (
    DOCUMENT_BYTES_MAX,
    DOCUMENT_DEPTH_MAX,
    DOCUMENT_NODES_MAX,
    InvalidDocument,
    Position,
    Value,
    nearest,
    parse_document,
)


def parse(text: str) -> Value:
    return parse_document(text, source="f.yaml").value


def refusal(text: str) -> str:
    with pytest.raises(InvalidDocument) as raised:
        parse(text)
    return str(raised.value)


def test_values_and_positions() -> None:
    document = parse_document("a: 1\nb:\n  - x\n  - {c: true, d: 1.5}\n", source="f.yaml")
    assert document.value == {"a": 1, "b": ["x", {"c": True, "d": 1.5}]}
    assert document.position(("b", 1, "d")) == Position(4, 15)
    assert document.position(("b", 1, "missing")) == Position(4, 5)
    assert str(document.problem(("b", 1, "d"), "is odd", "mend it")) == "f.yaml:4:15: b[1].d: is odd; mend it"


def test_the_same_key_twice() -> None:
    assert "f.yaml:3:1: the key 'a' is here twice, first in line 1" in refusal("a: 1\nb: 2\na: 3\n")
    assert "f.yaml:2:10: x: the key 'y' is here twice" in refusal("\nx: {y: , y: 1}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "f.yaml:1:4: a: YAML anchors are not accepted"),
        ("a: *x\n", "f.yaml:1:4: a: YAML aliases are not accepted"),
        ("<<: {a: 1}\n", "f.yaml:1:1: YAML merge keys are not accepted"),
        ("a: !!python/object/apply:os.system [ls]\n", "f.yaml:1:4: a: the YAML tag"),
        ("a: ! 5\n", "the YAML tag"),
        ("!!binary x\n", "the YAML tag"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: a second document"),
        ("[a]: 1\n", "a key that is a list or a mapping"),
        ("a: [1, 2\n", "f.yaml:2:1: not YAML"),
        ("a: yes\n", "f.yaml:1:4: a: 'yes' means different things"),
        ("a: off\n", "means different things"),
        ("a: 0777\n", "means different things"),
        ("a: 0x1F\n", "means different things"),
        ('"a\\nb": 1\n', "control characters"),
        ("a: \x00\n", "not YAML"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("'yes'", "yes"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("~", None), ("", None),
     ("-5", -5), ("0", 0), ("1e3", "1e3"), ("'1'", "1"), (".inf", ".inf"), ("=", "=")],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text: str, value: Value) -> None:
    assert parse(f"a: {text}\n") == {"a": value}


def test_limits_hold_at_the_limit_and_one_beyond() -> None:
    assert parse("[" * DOCUMENT_DEPTH_MAX + "]" * DOCUMENT_DEPTH_MAX)
    assert f"nested deeper than {DOCUMENT_DEPTH_MAX}" in refusal("[" * (DOCUMENT_DEPTH_MAX + 1))
    assert "nested deeper" in refusal("[" * 60_000), "depth must not become recursion"
    items = "[" + "1," * (DOCUMENT_NODES_MAX - 1) + "]"
    assert parse(items)
    assert f"more than {DOCUMENT_NODES_MAX} values" in refusal(items.replace("]", "1]"))
    assert parse("#" * DOCUMENT_BYTES_MAX) is None
    assert "longer than" in refusal("#" * (DOCUMENT_BYTES_MAX + 1))


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "anchors are not accepted" in refusal(bomb)


# PyYAML writes YAML 1.1, where `0o7` is a text that needs no quotes; in YAML 1.2 it is a number, so it is refused.
texts = st.text(max_size=8).filter(lambda text: not text.startswith("0o"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), below, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
def test_what_a_yaml_writer_writes_is_read_back(value: Value) -> None:
    text = yaml.safe_dump(value, default_style='"') if isinstance(value, str) else yaml.safe_dump(value)
    assert parse(text) == value


@given(st.text("abk:-[]{},&*!'\"|>#\n ~0123", max_size=40) | st.text(max_size=40))
def test_any_text_is_a_document_or_an_error(text: str) -> None:
    with contextlib.suppress(InvalidDocument):
        parse(text)


def test_the_nearest_word() -> None:
    assert nearest("memroy", ["memory", "pids"]) == "did you mean memory?"
    assert nearest("zzz", ["memory", "pids"]) == "known here: memory, pids"
