"""The text that profiles are written in means the same to its own fast reader and to the one of YAML, always."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cca_attention.profiles import layout, reading
from cca_attention.profiles.layout import laid_out, read_laid_out
from cca_attention.profiles.reading import MAX_BYTES, MAX_VALUES, ProfileError, parse_profile
from cca_attention.profiles.schema import Profile
from cca_attention.profiles.store import write_profile
from cca_attention.verify.sample_profile import TEXT


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The sample profile as `write_profile` writes it."""
    path = tmp_path_factory.mktemp("written") / "p.yaml"
    write_profile(parse_profile(TEXT.encode(), "p.yaml"), path)
    return path.read_text()


def fast_and_slow(text: str) -> tuple[Profile | str, Profile | str]:
    """What the fast reader and the one of YAML make of a text: a profile, or what they say."""

    def read() -> Profile | str:
        try:
            return parse_profile(text.encode(errors="surrogatepass"), "p.yaml")
        except ProfileError as error:
            return str(error)

    with mock.patch.object(reading, "read_laid_out", lambda text, most: None):
        slow = read()
    return read(), slow


def test_what_is_written_is_read_fast_and_is_yaml(text: str) -> None:
    with mock.patch.object(reading, "_Builder", side_effect=AssertionError("the slow reader was asked")):
        fast = parse_profile(text.encode(), "p.yaml")
    assert fast == parse_profile(TEXT.encode(), "p.yaml")
    assert read_laid_out(text, MAX_VALUES) == reading._Builder(text).document()
    assert max(map(len, text.splitlines())) < 400 and text.count("\n") > 30
    assert read_laid_out(TEXT, MAX_VALUES) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace('"vendor": ', '"arch": "sm_80", "vendor": '), "the key 'arch' is given twice"),
        (lambda text: text.replace("created:", "schema:"), "the key 'schema' is given twice"),
        (lambda text: text.replace('"sm_count": 108', '"sm_count": true'), "device.sm_count: Input should be a valid"),
        (lambda text: text.replace("[65536, 262144]", "[true, 262144]"), "seq_len.0: Input should be a valid integer"),
        (lambda text: text.replace('"sm_count": 108', '"sm_count": NaN'), "device.sm_count: Input should be a valid"),
        (lambda text: text.replace('"sm_count": 108', '"sm_count": ' + "[" * 50_000), "nested more than 12 deep"),
        (lambda text: text.replace('"a100"', '"a\\u0007"'), "holds characters that cannot be printed"),
        (lambda text: text.replace("device: {", "device:{"), "p.yaml"),
        (lambda text: text.replace("entries:\n- ", "entries:\nx: "), "entries: Input should be a valid tuple"),
        (lambda text: text + "- {}\n", "entries.1"),
        (lambda text: text.replace('"a100"', '"a"' + ', "a"' * MAX_VALUES), f"more than {MAX_VALUES} values"),
        (lambda text: text + " " * MAX_BYTES, f"more than {MAX_BYTES} bytes"),
    ],
)
def test_no_limit_is_passed_by_the_fast_reader(text: str, change: Callable[[str], str], said: str) -> None:
    assert change(text) != text
    fast, slow = fast_and_slow(change(text))
    assert fast == slow and isinstance(fast, str) and said in fast


def test_a_line_of_the_written_form_is_named_in_mistakes(text: str) -> None:
    fast, _ = fast_and_slow(text.replace('"sm_count": 108', '"sm_count": 0'))
    number = next(number for number, line in enumerate(text.splitlines(), 1) if '"sm_count"' in line)
    assert f"line {number}: device.sm_count: Input should be greater than 0" in str(fast)


def test_what_cannot_be_printed_is_never_another_text() -> None:
    for character in "\x85\u2028\x07\ud800":
        text = laid_out({"schema": "cca-profile/1.0", "created": f"now{character}"})
        with pytest.raises(ProfileError, match=r"cannot be printed|invalid Unicode"):
            parse_profile(text.encode(), "p.yaml")


NAMES = st.sampled_from(["a", "entries", "x_1"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(content=st.dictionaries(NAMES, VALUES, min_size=1))
def test_both_readers_read_the_same_of_what_was_laid_out(content: dict[str, object]) -> None:
    text = laid_out(content)
    fast = read_laid_out(text, MAX_VALUES)
    if fast is not None and "true" not in text and "false" not in text:
        builder = reading._Builder(text)
        assert fast == builder.document() and not builder.mistakes


@given(data=st.data())
def test_both_readers_make_the_same_of_a_damaged_text(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 60)))
    bits = st.sampled_from(['"', "{", "}", "[", "]", ",", ": ", "\n", "\n ", "- ", "true", "null", "1", "a:", "#", "'"])
    middle = "".join(data.draw(st.lists(bits | st.text(max_size=3), max_size=4)))
    fast, slow = fast_and_slow(text[:start] + middle + text[end:])
    assert fast == slow


def test_the_width_breaks_long_parts_only() -> None:
    short, long = {"a": 1, "b": [1, 2]}, {f"name_{number}": number for number in range(layout.WIDTH // 10)}
    assert laid_out({"x": short}) == 'x: {"a": 1, "b": [1, 2]}\n'
    assert laid_out({"x": long}).count("\n") == len(long)
