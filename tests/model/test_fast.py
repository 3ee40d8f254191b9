"""A model that was made ready to write writes the same, by greedy decoding and by beams."""

import pytest
import torch
from torch import nn

from vlm.data.batch import Text
from vlm.model.beam import Beams
from vlm.model.connector import MlpConnector
from vlm.model.fast import prepare_for_decoding
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.language import Language, llama, opt
from vlm.model.seq2seq import t5
from vlm.model.vlm import VisionLanguageModel
from vlm.nn import packed
from vlm.nn.packed import PackedLinear
from vlm.nn.tokens import IGNORE, IMAGE_ID

WORDS, DIM, EOS = 61, 32, 2
LANGUAGES = {
    "opt": lambda: opt(WORDS, DIM, 2, 4, max_positions=40),
    "llama": lambda: llama(WORDS, DIM, 2, 4, 2, tied=False),
    "t5, tied": lambda: t5(WORDS, DIM, 2, 4),
    "t5": lambda: t5(WORDS, DIM, 2, 4, tied=False),
}


def made(name: str) -> VisionLanguageModel:
    language: Language = LANGUAGES[name]()
    model = VisionLanguageModel(None, MlpConnector(20, DIM, 5), None, language)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim == 1), 0.3, generator)
    return model.eval().requires_grad_(False)


def written(model: VisionLanguageModel, how: Decoding) -> list[list[int]]:
    maker = torch.Generator().manual_seed(2)
    features = torch.randn(2, 5, 20, generator=maker)
    ids = torch.tensor([[IMAGE_ID] * 5 + [7, 9]] * 2)
    reply = None
    if model.reply_start is not None:
        start = torch.zeros(2, 1, dtype=torch.long)
        reply = Text(start, start == 0, torch.full_like(start, IGNORE), True)
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORE), True, reply)
    with torch.no_grad():
        out = model.write(model.see(features), text)
        return generate(model.proceed, model.logits(out.hidden[:, -1]), out.state, text.written.ids, EOS, how)


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("how", [Sampling(9, 9), Beams(3, 9, 9)])
@pytest.mark.parametrize("packs", [False, True])
def test_the_same_is_written(name: str, how: Decoding, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "onednn_is_exact", lambda: True)
    model, ready = made(name), made(name)
    prepare_for_decoding(ready, 6 if packs else 1)
    assert packs is any(isinstance(part, PackedLinear) for part in ready.modules())
    found = written(ready, how)
    assert found == written(model, how)
    assert found[0] != found[1]


def test_a_tied_vocabulary_in_bf16_is_packed_beside_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "bfloat16_is_fast", lambda device: True)
    model, ready = made("opt"), made("opt")
    prepare_for_decoding(ready.bfloat16(), 1)
    hidden = torch.randn(3, DIM).bfloat16()
    assert isinstance(ready.language.head, PackedLinear)  # type: ignore[union-attr]
    torch.testing.assert_close(ready.logits(hidden).float(), model.logits(hidden.float()), rtol=0.02, atol=0.05)
