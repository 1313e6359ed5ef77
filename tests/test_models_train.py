"""Training models with CCA: the oracle's gradients, checkpointing, torch.compile, packed documents, Trainer, FSDP2."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cca_attention import cca_attention
from cca_attention.kernels.reference import attention_dense
from cca_attention.models import enable

G, W = 4, 8
IDS = torch.randint(1, 97, (2, 29), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.cat((torch.arange(12), torch.arange(17)))[None].expand(2, -1)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path: the interpreter would take minutes."""
    monkeypatch.setattr("cca_attention.fused.INTERPRETED", False)


def build(dtype: torch.dtype = torch.float64) -> Any:
    """A tiny Llama with CCA, in training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).train()
    enable(model, G, W)
    return model


def train(model: nn.Module, call: Any = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient of one step."""
    logits = (model if call is None else call)(IDS, **options).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in model.named_parameters()}


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(build())

    def oracle(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        out, _ = attention_dense(q, k, v, group_size=G, window_size=W, core_heads="kv", scale=options["scaling"])
        return out.transpose(1, 2), None

    monkeypatch.setitem(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "cca", oracle)
    assert_close(found, train(build()))


def test_gradients_flow_through_the_pooling_weights() -> None:
    with_weights, uniform = build(), build()
    enable(uniform, G, W, pooling="mean")
    found, other = train(with_weights)[1], train(uniform)[1]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (found[name] - other[name]).abs().max() > 1e-3 * found[name].abs().max()


def test_autocast_computes_in_the_narrow_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    attention = "cca_attention.models.attention.cca_attention"
    monkeypatch.setattr(attention, lambda q, *rest, **how: (seen.add(q.dtype), cca_attention(q, *rest, **how))[1])
    loss, grads = train(build(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        narrow, narrow_grads = train(build(torch.float32))
        build(torch.float32).eval().generate(IDS, max_new_tokens=2)
    assert seen == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(narrow.float(), loss, rtol=0.05, atol=0)
    for name, grad in grads.items():
        assert torch.nn.functional.cosine_similarity(grad.flatten(), narrow_grads[name].flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(reentrant: bool) -> None:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(train(model), train(build()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"position_ids": DOCUMENTS}], ids=["rows", "packed"])
def test_it_compiles_whole(options: dict[str, Tensor]) -> None:
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(train(model, compiled, **options), train(build(), **options))


def test_a_padded_batch_compiles_whole() -> None:
    real = torch.ones_like(IDS)
    real[1, 20:] = 0
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(train(model, compiled, attention_mask=real), train(build(), attention_mask=real))


def test_packed_documents_train_as_if_alone() -> None:
    model = build()
    packed = model(IDS, position_ids=DOCUMENTS).logits
    alone = [model(IDS[:, rows]).logits for rows in (slice(0, 12), slice(12, 29))]
    assert_close(packed, torch.cat(alone, dim=1))
    weights = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (packed, torch.cat(alone, 1))]
    assert_close(*grads)


class Repeated(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same rows again and again."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def test_trainer_fine_tunes_the_projections_alone(tmp_path: Path) -> None:
    model = build(torch.float32)
    before = copy.deepcopy(model.state_dict())
    trained = ("q_proj", "k_proj", "v_proj", "o_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_steps=6,
        gradient_checkpointing=True, report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Repeated())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x.cpu(), before[name])}
    assert changed == {name for name in before if any(part in name for part in trained)}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "checkpoint-6").cca == model.config.cca


def sharded_step(rank: int, folder: Path) -> None:
    """One step of FSDP2 on two processes: rank 0 writes down the loss and a whole gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, grads = train(model)
    whole = grads["model.layers.0.self_attn.k_proj.weight"].full_tensor()
    if rank == 0:
        torch.save((loss, whole), folder / "result")
    distributed.destroy_process_group()


@pytest.mark.timeout(300)
def test_fsdp2(tmp_path: Path) -> None:
    # new processes: where there is a GPU, autograd refuses forked ones
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    workers = [subprocess.Popen([sys.executable, __file__, str(i), str(tmp_path)], env=environment) for i in range(2)]
    try:
        assert [worker.wait(120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    loss, grad = torch.load(tmp_path / "result")
    expected, grads = train(build())
    assert_close(loss, expected)
    assert_close(grad, grads["model.layers.0.self_attn.k_proj.weight"])


if __name__ == "__main__":  # one of the workers above
    sharded_step(int(sys.argv[1]), Path(sys.argv[2]))
