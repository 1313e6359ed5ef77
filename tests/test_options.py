"""What the options of `cca-tune` mean, and how a mistyped one is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cca_attention.autotune.options import (
    EFFORTS,
    Bucket,
    ModelShape,
    buckets,
    directions,
    effort,
    limit,
    model_shape,
    model_table,
    seconds,
    sizes,
)
from cca_attention.problem import Problem


def lengths(text: str) -> list[int]:
    return [bucket.ctx for bucket in buckets(text)]


def test_one_context_several_and_ranges() -> None:
    assert buckets("131072") == (Bucket(131072, 131072),)
    assert lengths("8192, 1024,8192") == [1024, 8192]
    assert buckets("4096..16384") == (Bucket(4096, 4096), Bucket(8192, 4097), Bucket(16384, 8193))
    assert lengths("4096..131072") == [4096 * 2**n for n in range(6)]
    assert lengths("3000..10000") == [3000, 6000, 10000]
    assert lengths("64..64") == [64] and lengths("1..3,512") == [1, 2, 3, 512]


@pytest.mark.parametrize("text", ["4096..131072", "1..100", "7..8"])
def test_the_buckets_of_a_range_are_all_of_it_and_do_not_overlap(text: str) -> None:
    first, last = map(int, text.split(".."))
    found = buckets(text)
    assert found[0].least == first and found[-1].ctx == last
    assert all(after.least == before.ctx + 1 for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("many", "--ctx many: 'many' is not a whole number; it takes one (131072), several"),
        ("1.5", "'1.5' is not a whole number"),
        ("1,,2", "'' is not a whole number"),
        ("4096..", "'' is not a whole number"),
        ("9..8", "--ctx 9..8 is empty: it begins above its end"),
        ("0", "--ctx must be in 1..2147483648, got 0"),
        ("-5..8", "--ctx must be in 1..2147483648, got -5"),
        ("1" * 20, "--ctx must be in 1..2147483648"),
        (",".join(map(str, range(1, 40))), "has 39 contexts, more than 32"),
    ],
)
def test_a_context_that_is_none(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        buckets(text)
    assert said in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("10m", 600), ("90s", 90), ("90", 90), ("1.5h", 5400), (" 2m ", 120)])
def test_a_budget(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "0", "0m", "-3s", "5d", "nan", "inf", "1e400", "m"])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"--budget must be a time such as 90s, 10m or 1h, got"):
        seconds(text)


def test_sizes_and_limits() -> None:
    assert sizes("--group-sizes", "16, 8,16") == (8, 16)
    for text, said in (("", "must be whole numbers with commas between, got ''"), ("0,4", "must be at least 1, got 0")):
        with pytest.raises(ValueError, match=f"--group-sizes {said}"):
            sizes("--group-sizes", text)
    assert limit("--max-error", 0.5) == 0.5 and limit("--max-error", None) is None
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--max-error must be a number above 0, got"):
            limit("--max-error", value)


def test_phases() -> None:
    assert directions("prefill") == ("forward",)
    assert directions("train, decode,prefill") == ("forward", "backward", "decode")
    with pytest.raises(ValueError, match=r"--phase must be of prefill, .*, got 'decoed'; did you mean decode\?"):
        directions("train,decoed")


def test_efforts_grow() -> None:
    assert effort("standard").candidates == 24, "what the default command has always looked at"
    assert EFFORTS["quick"].unseen < EFFORTS["quick"].candidates < 24 and EFFORTS["exhaustive"].candidates == 0
    assert [e.rounds for e in EFFORTS.values()] == sorted(e.rounds for e in EFFORTS.values())
    with pytest.raises(ValueError, match=r"--effort must be one of quick, .*, got 'qick'; did you mean quick\?"):
        effort("qick")


@pytest.mark.parametrize("name", model_table())
def test_every_model_is_a_problem(name: str) -> None:
    shape = model_shape(name)
    Problem(q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, seq_len=4096)


def test_a_model_is_found_by_its_usual_names() -> None:
    expected = ModelShape(32, 8, 128)
    for name in ("llama3.1-8b", "Llama3.1-8B", "meta/Llama3.1-8B-Instruct", "llama3.1_8b"):
        assert model_shape(name) == expected


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config, expected in (
        ({"num_attention_heads": 16, "hidden_size": 1024}, ModelShape(16, 16, 64)),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256},
            ModelShape(8, 2, 256),
        ),
        ({"text_config": {"num_attention_heads": 4, "hidden_size": 64}}, ModelShape(4, 4, 16)),
    ):
        path.write_text(json.dumps(config))
        assert model_shape(str(path)) == model_shape(str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "num_attention_heads must be a whole number above 0, got None"),
        ('{"num_attention_heads": "8"}', "num_attention_heads must be a whole number above 0, got '8'"),
        ('{"num_attention_heads": 8}', "hidden_size must be a whole number above 0, got None"),
        ("[1]", "num_attention_heads must be"),
        ("{", "cannot be read: "),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        model_shape(str(tmp_path))
    assert said in str(error.value) and str(error.value).startswith("--model ")


def test_a_mistyped_model_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model 'lama3.1-8b' is neither known .* did you mean llama3.1-8b"):
        model_shape("lama3.1-8b")
    with pytest.raises(ValueError, match=r"known: llama2-7b, .*gemma2-27b"):
        model_shape("zzz")
    with pytest.raises(ValueError, match=r"missing/config.json cannot be read"):
        model_shape(str(tmp_path / "missing" / "config.json"))


def test_nothing_heavy_is_loaded() -> None:
    program = (
        "import sys; from cca_attention.autotune import options\n"
        "print([m for m in ('torch', 'triton', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done
