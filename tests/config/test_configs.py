"""Every config in configs/: its settings are right, its model builds without memory, in the published size."""

from pathlib import Path

import pytest
import torch

from vlm import build, build_data
from vlm.config.load import load
from vlm.config.schema import BpeTokenizer, ChatData, ClipTokenizer, FileTokenizer, PublishedTokenizer, Run
from vlm.data.talk_batch import Reader
from vlm.data.text import clip_tokenizer, train_bpe
from vlm.model.language import Decoder

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
WORDS = train_bpe(["a red square"], 300)  # in place of vocabularies that have to be fetched or learned


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_it_loads_and_builds_on_the_meta_device(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load(Run, path, [])
    remote = isinstance(run.tokenizer, PublishedTokenizer | FileTokenizer)
    words = WORDS if remote else build_data.tokenizer(run.tokenizer, ["a red square"])
    with torch.device("meta"):
        asks = isinstance(run.data, ChatData) and run.data.instruction is not None
        model = build.model(run, words, Reader(words, 16) if asks else None)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert path.read_text().startswith("#"), "what it is and where it comes from stands first"


def sizes() -> dict[str, float]:
    """Millions of parameters by the papers."""
    return {
        "clip": 151,
        "blip2_stage2_opt": 3745,
        "blip2_stage2_t5": 3942,
        "llava15_stage1": 7063,
        "minigpt4_stage1": 7830,
        "deepseekmoe_2b": 1966,  # 1,890 in its experts
        "deepseekmoe_16b": 16376,
        "retnet_1b3": 1300,
        "retnet_6b7": 6700,
    }


@pytest.mark.parametrize(("name", "millions"), sizes().items())
def test_it_is_as_large_as_the_published_one(name: str, millions: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = load(Run, ROOT / "configs" / f"{name}.yaml", [])
    clip = isinstance(run.tokenizer, ClipTokenizer)
    with torch.device("meta"):
        model = build.model(run, clip_tokenizer() if clip else WORDS)
    found = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(run.tokenizer, BpeTokenizer) and isinstance(model.language, Decoder):  # one that is yet to be learned
        tables = 1 if model.language.head is None else 2
        found += tables * (run.tokenizer.vocab - WORDS.size) * model.language.dim
    assert found / 1e6 == pytest.approx(millions, rel=0.05)
