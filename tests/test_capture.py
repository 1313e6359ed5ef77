"""`cca-tune capture`: what a model's attention gets, in the file that --qkv reads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from cca_attention import cli
from cca_attention.autotune.tensors_file import read_activations
from cca_attention.terminal import OK, USAGE

VOCABULARY = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "max_position_embeddings": 1024,
}  # fmt: skip
TEXT = " ".join(f"w{1 + i * i % 96}" for i in range(700))


def saved(folder: Path, family: str = "Llama", **changes: Any) -> Path:
    """A small random model and its tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of capturing the model and the text in `folder`."""
    with pytest.raises(SystemExit) as ended:
        cli.tune_main(
            ["capture", str(folder), str(folder / "text.txt"), "--output", str(folder / "dump.safetensors"), *arguments]
        )
    return int(str(ended.value.code)), capsys.readouterr().err


def attended(folder: Path, layer: int, tokens: int) -> Tensor:
    """(T, Hq, D): what the model's own attention gives in a layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids[:, :tokens]
    seen: list[Tensor] = []
    model.get_decoder().layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(ids)
    return seen[0][0].unflatten(-1, (4, -1))


@pytest.mark.parametrize(("family", "changes"), [("Llama", {}), ("Granite", {"attention_multiplier": 0.7})])
def test_the_file_has_what_the_model_attends_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, changes: dict[str, Any]
) -> None:
    folder = saved(tmp_path, family, **changes)
    code, err = run(capsys, folder, "--tokens", "600", "--layers", "3,1", "--dtype", "fp32")
    assert code == OK and "600 tokens of text.txt through" in err and "wrote " in err
    found = read_activations(folder / "dump.safetensors")
    assert list(found) == ["dump.safetensors, layer 1", "dump.safetensors, layer 3"]
    for layer in (1, 3):
        data = found[f"dump.safetensors, layer {layer}"]
        assert data.q.shape == (4, 600, 8) and data.k.shape == data.v.shape == (2, 600, 8)
        q, k, v = data.q, data.k.repeat_interleave(2, 0), data.v.repeat_interleave(2, 0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out.transpose(0, 1), attended(folder, layer, 600), rtol=1e-4, atol=1e-5)


def test_heads_come_with_their_queries_and_the_file_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path)
    assert run(capsys, folder, "--dtype", "bf16")[0] == OK
    whole = read_activations(folder / "dump.safetensors")
    assert [name.split()[-1] for name in whole] == ["0", "1", "3", "4"]
    assert run(capsys, folder, "--dtype", "bf16", "--heads", "1", "--layers", "4")[0] == OK
    (part,) = read_activations(folder / "dump.safetensors").values()
    data = whole["dump.safetensors, layer 4"]
    assert torch.equal(part.q, data.q[2:]) and torch.equal(part.k, data.k[1:]) and torch.equal(part.v, data.v[1:])
    content = (folder / "dump.safetensors").read_bytes()
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert about["architecture"] == "LlamaForCausalLM" and about["tokens"] == "700" and about["layers"] == "4"
    assert about["text"] == "text.txt" and len(about["text_sha256"]) == len(about["config_sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "5"], "--layers: the model has no 5 with full attention; it has 0,1,2,3,4"),
        (["--layers", "one"], "--layers must be whole numbers with commas between, got 'one'"),
        (["--heads", "2"], "--heads: the model has no 2; it has 0,1"),
        (["--tokens", "701"], "TEXT is too short: it has 700 tokens, and 701 are needed"),
        (["--tokens", "2000"], "--tokens must be from 512 to 1024, the model's longest sequence, got 2000"),
        (["--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
    ],
)
def test_what_cannot_be_captured_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, err = run(capsys, saved(tmp_path), *arguments)
    assert (code, err) == (USAGE, f"cca-tune: {said}\n")
    assert not (tmp_path / "dump.safetensors").exists()


def test_a_sliding_layer_is_none_to_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    folder = saved(tmp_path, "Qwen3", sliding_window=64, use_sliding_window=True, layer_types=kinds, head_dim=8)
    assert "no 0 with full attention; it has 1,3" in run(capsys, folder, "--layers", "0")[1]
    assert run(capsys, folder)[0] == OK
    assert [name.split()[-1] for name in read_activations(folder / "dump.safetensors")] == ["1", "3"]


def test_files_are_looked_at_before_the_model_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "model")
    output = str(tmp_path / "none" / "dump.safetensors")
    code, err = run(capsys, folder, "--output", output)
    assert code == USAGE and "there is no directory" in err and err.count("\n") == 1
    (tmp_path / "text.txt").write_text(TEXT)
    assert "cannot be loaded" in run(capsys, tmp_path)[1]
    (folder / "text.txt").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in run(capsys, folder)[1]
    (folder / "text.txt").write_text("w1 w2")
    assert "TEXT is too short: it has 2 tokens, and 512 are needed" in run(capsys, folder)[1]
    (folder / "model.safetensors").write_bytes(b"nothing")
    code, err = run(capsys, folder)
    assert code == USAGE and err.startswith(f"cca-tune: MODEL {folder} cannot be loaded: ") and err.count("\n") == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert "capture needs transformers: pip install 'cca-attention[hf]'" in run(capsys, folder)[1]
