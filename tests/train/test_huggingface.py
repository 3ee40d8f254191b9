"""Models of transformers as the language model of a run: trained, saved, restored, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tests.tiny import picture, records, tiny_run
from vlm import build
from vlm.config.schema import Run
from vlm.data.image import decode
from vlm.data.text import Tokenizer, train_bpe
from vlm.model.beam import Beams
from vlm.model.describe import describe
from vlm.model.generate import Decoding, Sampling
from vlm.model.huggingface import HuggingFaceLanguage
from vlm.restore import Trained, restore
from vlm.train.run import train_run

FROZEN = "train.params=[{match: 'language.*', lr: null}, {match: '.*', lr: 0.01}]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Published folders: one with a tied head, one without."""
    root = tmp_path_factory.mktemp("published")
    sizes = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 300}
    gpt2 = GPT2Config(**sizes, n_embd=24, n_layer=1, n_head=2, n_positions=64)
    llama = LlamaConfig(
        **sizes, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=None
    )
    for name, config in (("gpt2", gpt2), ("llama", llama)):
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in ("gpt2", "llama")}


def run_of(tmp_path: Path, folder: Path, *overrides: str, pretrained: bool = True) -> Run:
    language = f"model.language={{kind: huggingface, name: {folder}, pretrained: {str(pretrained).lower()}}}"
    return tiny_run(tmp_path, "decoder", language, "train.batch_size=16", *overrides)


@pytest.mark.parametrize(("name", "pretrained"), [("gpt2", True), ("llama", False)])
def test_it_learns_and_is_restored(name: str, pretrained: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    learns = "train.params=[{match: '.*', lr: 0.01}]"
    train_run(run_of(tmp_path, folders[name], learns, "train.steps=4", pretrained=pretrained), out)
    losses = [record["train/loss_lm"] for record in records(out) if "train/loss_lm" in record]
    assert losses[-1] < 0.95 * losses[0]
    stored = load_file(next(out.glob("step-*")) / "model.safetensors")
    assert ("language.module.lm_head.weight" in stored) == (name == "llama")  # gpt2's is the embedding
    trained = restore(out)
    assert all(torch.equal(value, stored[key]) for key, value in trained.model.state_dict().items())
    for decoding in (Sampling(6), Beams(2, max_new=6)):
        assert captions(trained, ["red", "blue"], decoding) == [
            text for colour in ("red", "blue") for text in captions(trained, [colour], decoding)
        ]


def captions(trained: Trained, colours: list[str], decoding: Decoding) -> list[str]:
    assert trained.model.vision is not None
    transform = trained.model.vision.transform
    images = transform.normalize(torch.stack([transform.pixels(decode(picture(colour))) for colour in colours]))
    data = trained.run.pairs
    return describe(trained.model, trained.tokenizer, images, data.template, data.max_tokens, decoding)


def test_a_frozen_one_is_not_stored(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(run_of(tmp_path, folders["gpt2"], FROZEN, "train.steps=2"), out)
    stored = load_file(next(out.glob("step-*")) / "model.safetensors")
    assert stored and not any(name.startswith("language.") for name in stored)
    assert restore(out).step == 2


def test_a_frozen_one_in_bfloat16(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(run_of(tmp_path, folders["llama"], FROZEN, "train.steps=8", "model.language.dtype=bfloat16"), out)
    trained = restore(out)
    assert isinstance(trained.model.language, HuggingFaceLanguage)
    assert {p.dtype for p in trained.model.language.parameters()} == {torch.bfloat16}
    losses = [record["train/loss_lm"] for record in records(out) if "train/loss_lm" in record]
    assert losses[-1] < losses[0]
    assert len(captions(trained, ["red", "blue"], Beams(2, max_new=4))) == 2


def test_a_tokenizer_of_more_tokens_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = train_bpe([f"{i} {i * 37} words {i**3}" for i in range(400)], 400)
    assert isinstance(wide, Tokenizer) and wide.size > 300
    with pytest.raises(ValueError, match=r"model\.language\.name=.*: it knows 300 tokens, the tokenizer \d+: take its"):
        build.model(run_of(tmp_path, folders["gpt2"]), wide)
