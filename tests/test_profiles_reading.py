"""A profile is data from a stranger: whatever the bytes, the answer is a profile or one error that says all."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cca_attention.profiles import reading
from cca_attention.profiles.reading import MAX_BYTES, ProfileError, parse_profile, read_profile
from cca_attention.profiles.schema import Profile, ProfileWarning
from cca_attention.profiles.store import write_profile
from cca_attention.verify.sample_profile import TEXT

ROOT = Path(__file__).parents[1]


def parse(text: str | bytes) -> Profile:
    """The profile of a file `p.yaml` with this text."""
    return parse_profile(text.encode() if isinstance(text, str) else text, "p.yaml")


def mistakes_of(text: str | bytes) -> str:
    """What is said of a file that is no profile."""
    with pytest.raises(ProfileError) as caught:
        parse(text)
    return str(caught.value)


def line_of(text: str, words: str) -> int:
    """The number of the first line with these words."""
    return next(number for number, line in enumerate(text.splitlines(), start=1) if words in line)


def test_every_block_is_read_and_survives_being_written(tmp_path: Path) -> None:
    profile = parse(TEXT)
    assert profile.policy["forward"].cold_l2 and profile.search["forward"].failed == {"shared memory": 3, "timeout": 1}
    (entry,), (point,) = profile.entries, profile.pareto
    assert entry.interval is not None and entry.interval.seq_len == (65536, 262144)
    assert entry.latency is not None and entry.latency.mad_us == 120.0 and entry.latency.sessions == 3
    assert entry.baseline.margin is not None and entry.baseline.margin.ci95 == (1.01, 1.03)
    assert entry.determinism is not None and entry.determinism.batch_invariant
    assert entry.verification is not None and entry.verification.bitwise_repeatable
    assert point.quality_proxy == "mass recall on needles" and profile.kernels["forward"].abi == 1
    write_profile(profile, tmp_path / "p.yaml")
    again = read_profile(tmp_path / "p.yaml")
    assert again == profile and again.source == str(tmp_path / "p.yaml") and profile.source == "p.yaml"


@pytest.mark.parametrize(
    ("written", "read"), [("3.10", "3.10"), ("3", "3"), ("1e-2", "1e-2"), ("'3.10'", "3.10"), ("no", "no")]
)
def test_a_version_is_the_text_that_was_written(written: str, read: str) -> None:
    assert parse(TEXT.replace(f"triton: {triton.__version__}", f"triton: {written}")).software.triton == read


def test_numbers_are_what_the_schema_says() -> None:
    profile = parse(TEXT.replace("hbm_gbps: 2039.0", "hbm_gbps: 2.039e3").replace("sm_count: 108", "sm_count: '108'"))
    assert profile.device.hbm_gbps == 2039.0 and profile.device.sm_count == 108


def test_all_mistakes_are_reported_at_once_with_their_lines() -> None:
    text = TEXT
    for right, wrong in {
        "sm_count: 108": "sm_count: -4",
        "  arch: sm_80\n": "",
        "hbm_gbps: 2039.0": "hbm_gbps: .inf",
        "  core_heads: query\n": "  core_heads: query\n  core_heads: kv\n",
        "suite: config/2": "suite: !!python/object:os.system config/2",
        "shared_bytes: 98304": "shared_bytes: many",
        "p80_us: 51500.0": "p80_us: *nowhere",
        "reduction_class: bk64": 'reduction_class: "b\\e[31mk"',
        "pareto:": "surprise: 1\npareto:",
    }.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    message = mistakes_of(text)
    assert message.startswith("p.yaml has 10 mistakes:")
    for words, place in {
        "sm_count: -4": "device.sm_count: Input should be greater than 0",
        "device:": "device.arch: Field required",
        "hbm_gbps": "device.hbm_gbps",
        "core_heads: kv": "the key 'core_heads' is given twice",
        "suite:": "the tag '.*python/object:os.system': tags are not taken",
        "many": "entries.0.resources.0.shared_bytes",
        "*nowhere": "the alias [*]nowhere is of nothing that ends before it",
        "reduction_class": "the text .* holds characters that cannot be printed",
        "surprise": "surprise: Extra inputs are not permitted",
    }.items():
        assert re.search(f"line {line_of(text, words)}: {place}", message), place
    lines = [int(line) for line in re.findall(r"^  line (\d+)", message, re.MULTILINE)]
    assert lines == sorted(lines)


def test_what_contradicts_is_reported_entry_by_entry() -> None:
    entry = TEXT[TEXT.index("- kernel: forward\n  problem") :]
    other = entry.replace("dtype: bfloat16", "dtype: float16").replace("kv_heads: 8", "kv_heads: 16")
    foreign = entry.replace("group_size: 16", "group_size: 8")
    text = TEXT + entry + other + foreign
    first = line_of(text, "- kernel: forward")
    length = len(entry.splitlines())
    message = mistakes_of(text)
    assert f"line {first + length}: more than one entry for forward" in message
    assert re.search(f"line {first + 2 * length}: .* has the dtype float16, the semantic block only bfloat16", message)
    assert re.search(f"line {first + 3 * length}: .* has other semantics than the profile", message)
    assert "has 3 mistakes" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema: cca-profile/1.0\nschema: cca-profile/1.0\n", "line 2: the key 'schema' is given twice"),
        ("schema: cca-profile/1.0\ndevice:\n  name: a\n  name: b\n", "line 4: the key 'name' is given twice"),
        ("schema: cca-profile/1.0\nentries: [\n", "line 3"),
        ("schema: cca-profile/2.0\n", "is a 'cca-profile/2.0'; this program reads cca-profile/1"),
        ("schema: cca-profile/1.x\n", "this program reads cca-profile/1"),
        ("schema: cca-profile/1.0\n---\nschema: cca-profile/1.0\n", "a second document begins"),
        ("schema: cca-profile/1.0\n? [a]\n: b\n", "line 2: a key that is no text"),
        ("model: llama\n", "is not a profile"),
        ("- schema: cca-profile/1.0\n", "is not a profile"),
        ("", "is not a profile"),
        (b"schema: \xff\xfe", "is not text in UTF-8: byte 8"),
        ("schema: cca-profile/1.0\nx: \0\n", "special characters|control characters|unacceptable"),
        ("schema: cca-profile/1.0\na: &a [*a]\n", "line 2: the alias [*]a is of nothing that ends before it"),
    ],
)
def test_a_file_that_is_no_profile_says_why(text: str | bytes, said: str) -> None:
    assert re.search(said, mistakes_of(text))


def test_bombs_are_refused_before_they_go_off() -> None:
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        laughs += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n"
    assert "line 7: it has more than 250000 values" in mistakes_of("schema: cca-profile/1.0\n" + laughs)
    deep = "schema: cca-profile/1.0\nx: " + "[" * 200_000
    assert "line 2: it is nested more than 12 deep" in mistakes_of(deep)
    steps = "".join(f"b{i}: &b{i} [*b{i - 1}]\n" for i in range(1, 20))
    assert "nested more than 12 deep" in mistakes_of("schema: cca-profile/1.0\nb0: &b0 [x]\n" + steps)
    assert f"more than {MAX_BYTES} bytes" in mistakes_of(b"#" * (MAX_BYTES + 1))
    assert "it has more than 250000 values" in mistakes_of("schema: cca-profile/1.0\nx: [" + "1," * 300_000 + "]")
    huge = TEXT.replace("seq_len: 131072", "seq_len: " + "9" * 400)
    assert "entries.0: a size of the problem is beyond 281474976710656" in mistakes_of(huge)


def test_aliases_repeat_what_they_name() -> None:
    text = TEXT.replace("    config: {num_warps: 4, num_stages: 2, block_q: 128, block_k: 32}", "    config: *c")
    text = text.replace("  config: {num_warps: 4,", "  config: &c {num_warps: 4,")
    (entry,) = parse(text).entries
    assert entry.baseline.config == entry.config == {"num_warps": 4, "num_stages": 2, "block_q": 128, "block_k": 64}


def test_without_libyaml_the_same_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = parse(TEXT)
    monkeypatch.setattr(reading, "_PARSER", yaml.BaseLoader)
    assert parse(TEXT) == expected
    assert "nested more than 12 deep" in mistakes_of("schema: cca-profile/1.0\nx: " + "[" * 2000)


def test_a_newer_minor_version_is_read_without_what_is_new_in_it() -> None:
    newer = TEXT.replace("profile/1.0", "profile/1.7").replace("sm_count", "colour: green\n  sm_count")
    with pytest.warns(ProfileWarning, match=r"p.yaml is of cca-profile/1.7; not understood here: device.colour"):
        assert parse(newer).device == parse(TEXT).device
    with pytest.warns(ProfileWarning):
        assert "device.sm_count" in mistakes_of(newer.replace("sm_count: 108", "sm_count: green"))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="is not a file"):
        read_profile(tmp_path)


# --- fuzzing -----------------------------------------------------------------------------------------------------

CONTENT: dict[str, Any] = yaml.safe_load(TEXT)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(10**30, 10**40),
    st.sampled_from(["1e400", "forward", "a", "../x", "__class__", "NaN", "-1", "0", "99999999999999999999"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def parts(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values inside of `value`."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    deeper = [found for key, item in inner for found in parts(item, (*place, key))]
    return [(*place, key) for key, _ in inner] + deeper


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A valid profile in which some values were replaced, dropped, renamed or doubled."""
    content = copy.deepcopy(CONTENT)
    for _ in range(draw(st.integers(1, 4))):
        *parents, last = draw(st.sampled_from(parts(content)))
        block = content
        for step in parents:
            block = block[step]
        change = draw(st.sampled_from(["replace", "drop", "rename", "double"]))
        if change == "replace":
            block[last] = draw(VALUES)
        elif change == "double" and isinstance(block, list):
            block.append(copy.deepcopy(block[last]))
        else:
            value = block.pop(last)
            if change == "rename" and isinstance(block, dict):
                block[draw(st.text(max_size=6))] = value
    return yaml.safe_dump(content, sort_keys=False)


def gives_a_profile_or_one_error(data: bytes) -> None:
    """Nothing else may come of any bytes; and what is a profile can be asked."""
    try:
        profile = parse_profile(data, "p.yaml")
    except ProfileError as error:
        assert "p.yaml" in str(error)
    else:
        for entry in profile.entries:
            profile.schedule(entry.problem)


@pytest.mark.filterwarnings("ignore::cca_attention.profiles.schema.ProfileWarning")
@given(text=mutated())
def test_a_mutated_profile_is_a_profile_or_one_error(text: str) -> None:
    gives_a_profile_or_one_error(text.encode())


@pytest.mark.filterwarnings("ignore::cca_attention.profiles.schema.ProfileWarning")
@given(data=st.data())
def test_damaged_bytes_are_a_profile_or_one_error(data: st.DataObject) -> None:
    whole = TEXT.encode()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 200)))
    gives_a_profile_or_one_error(whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:])


@given(noise=st.binary(max_size=400), text=st.text(max_size=200))
def test_raw_bytes_are_one_error(noise: bytes, text: str) -> None:
    for data in (noise, text.encode(errors="surrogatepass"), b"schema: cca-profile/1.0\n" + noise):
        with pytest.raises(ProfileError):
            parse_profile(data, "p.yaml")


def test_nothing_that_a_profile_names_is_imported() -> None:
    text = TEXT.replace("kernel: forward\n  problem", "kernel: antigravity\n  problem")
    script = (
        "import sys; from cca_attention.profiles.reading import ProfileError, parse_profile\n"
        "try: parse_profile(sys.stdin.buffer.read(), 'p')\n"
        "except ProfileError as error: print('antigravity' in sys.modules, error)"
    )
    child = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, text=True)
    assert child.stdout.startswith("False") and "no kernel is called 'antigravity'" in child.stdout, child.stderr
