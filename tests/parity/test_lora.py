"""Adapters of ours are peft's on transformers' Llama: logits, gradients, merged, and folders read by either side."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.parity.decoders import ids, logits
from tests.parity.noise import gap, noise
from tests.parity.small_llama import pair
from vlm.loss.language import language, supervised
from vlm.model.adapter_file import load_adapter, save_adapter
from vlm.model.language import Decoder
from vlm.model.lora import Lora, add_lora, merge_lora
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.llama import llama_table
from vlm.model.weights.rows import Row
from vlm.model.weights.table import Table
from vlm.nn.adapter import adapters, is_adapter
from vlm.nn.tokens import Tokens

TABLE = llama_table(True)
SETTINGS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 3}}


def adapted(folder: Path, **changes: object) -> tuple[Decoder, PeftModel]:
    """Our decoder with the adapters that peft has made, trained (as noise has it) and saved for theirs."""
    ours, theirs = pair()
    config = LoraConfig(
        **{**SETTINGS, "r": 4, "lora_alpha": 6, "alpha_pattern": {"layers.1.mlp.down_proj": 5}} | changes
    )
    wrapped = get_peft_model(theirs, config)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            noise(nn.ParameterDict({"x": parameter}), seed=len(name), scale=0.2)
    wrapped.save_pretrained(str(folder))
    load_adapter(ours, folder, TABLE)
    return ours, wrapped.eval()


def peer(name: str) -> str:
    """peft's name of our adapter's parameter."""
    stem, kind = name.split(".lora_")
    (unit,) = TABLE.writing({f"{stem}.weight": torch.zeros(())})
    return f"base_model.model.{unit.theirs[0].removesuffix('.weight')}.lora_{kind}"


def test_logits_from_peft_s_own_folder(tmp_path: Path) -> None:
    ours, theirs = adapted(tmp_path / "adapter")
    plain, _ = pair()
    expected = theirs(ids()).logits
    assert gap(logits(ours, ids()), expected) < 1e-5
    assert gap(logits(plain, ids()), expected) > 0.05
    merge_lora(ours)
    assert gap(logits(ours, ids()), expected) < 1e-5
    assert list(ours.state_dict()) == list(plain.state_dict())


def test_rank_stabilised(tmp_path: Path) -> None:
    ours, theirs = adapted(tmp_path / "adapter", use_rslora=True)
    assert gap(logits(ours, ids()), theirs(ids()).logits) < 1e-5


def test_gradients(tmp_path: Path) -> None:
    ours, theirs = adapted(tmp_path / "adapter")
    labels = ids().clone()
    labels[:, :6] = -100
    hidden, target = supervised(ours(Tokens.of(ours.embed(ids()))).hidden, labels)
    loss = language(ours.logits(hidden), target)
    expected = theirs(ids(), labels=labels).loss
    loss.backward()
    expected.backward()
    assert gap(loss, expected) < 1e-5
    mine = {peer(name): parameter.grad for name, parameter in ours.named_parameters() if is_adapter(name)}
    peers = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert mine.keys() == peers.keys() and len(mine) == 2 * 3 * 3
    for name, gradient in peers.items():
        assert float(gradient.abs().max()) > 1e-5 and gap(mine[name], gradient) < 1e-5


def test_peft_reads_our_folder(tmp_path: Path) -> None:
    ours, _ = pair()
    specs = [Lora(r".*\.(query|up)", rank=5, alpha=3.0), Lora(r".*\.1\.ffn\.gate", rank=2, alpha=8.0)]
    add_lora(ours, specs)
    for name, parameter in ours.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3
    save_adapter(ours, tmp_path / "adapter", table=TABLE)
    theirs = PeftModel.from_pretrained(pair()[1], str(tmp_path / "adapter")).eval()
    assert gap(logits(ours, ids()), theirs(ids()).logits) < 1e-5
    again, _ = pair()
    assert set(load_adapter(again, tmp_path / "adapter", TABLE)) == set(adapters(ours))
    assert torch.equal(logits(again, ids()), logits(ours, ids()))
    behind = VisionLanguageModel(language=pair()[0])
    names = load_adapter(behind, tmp_path / "adapter", TABLE.under("", "language."))
    assert torch.equal(logits(behind.language, ids()), logits(ours, ids()))
    assert "language.stack.blocks.1.ffn.gate" in names


def test_layers_that_one_side_has_fused_or_tied(tmp_path: Path) -> None:
    ours, theirs = pair()
    head = get_peft_model(theirs, LoraConfig(r=2, target_modules=["lm_head"]))
    head.save_pretrained(str(tmp_path / "head"), save_embedding_layers=False)
    with pytest.raises(ValueError, match="llama: lm_head: fused or tied with others in one of the two layouts"):
        load_adapter(ours, tmp_path / "head", TABLE)
    fused = Table("fused", (Row("qkv.weight", tuple(f"stack.blocks.0.mixer.{n}.weight" for n in ("query", "key"))),))
    add_lora(ours, [Lora(r"stack\.blocks\.0\.mixer\.(query|key)")])
    with pytest.raises(ValueError, match=r"fused: stack\.blocks\.0\.mixer\.query, .*: fused or tied"):
        save_adapter(ours, tmp_path / "fused", table=fused)
    assert not (tmp_path / "fused").exists()


def scaled(model: Decoder, factor: float) -> Tensor:
    """Logits with one adapter's matrix multiplied."""
    own = adapters(model)["stack.blocks.1.ffn.down"]
    with torch.no_grad():
        own.up.weight.mul_(factor)
    return logits(model, ids())


@pytest.mark.parametrize("factor", [6 / 5, 3 / 4])
def test_another_alpha_or_rank_is_noticed(tmp_path: Path, factor: float) -> None:
    """The layer's own alpha, 5, against the common 6; its own rank, 3, against the common 4."""
    ours, theirs = adapted(tmp_path / "adapter")
    assert gap(scaled(ours, factor), theirs(ids()).logits) > 1e-3


def test_a_layer_that_theirs_lacks_is_named(tmp_path: Path) -> None:
    theirs: LlamaForCausalLM = pair()[1]
    config = LoraConfig(**SETTINGS, r=2)
    get_peft_model(theirs, config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"does not fit this model:\n  model\.layers\.0\.mlp\.down_proj is not in the"):
        load_adapter(pair()[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"odd: llama: published tensors that our table does not know: x\.weight"):
        (tmp_path / "odd").mkdir()
        for file in (tmp_path / "adapter").iterdir():
            (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
        rename(tmp_path / "odd" / "adapter_model.safetensors")
        load_adapter(pair()[0], tmp_path / "odd", TABLE)


def rename(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors |= {f"base_model.model.x.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(tensors, file)
