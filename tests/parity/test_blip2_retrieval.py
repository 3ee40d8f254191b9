"""BLIP-2's first stage from Hugging Face's files is transformers' `Blip2ForImageTextRetrieval`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from tests.parity.blip2 import QFORMER, QUERIES, VISION, instructions, pictures
from tests.parity.noise import gap
from tests.parity.published import loaded, same, saved, written
from vlm.data.batch import Text
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.part import Part
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import read

FILE = "model.safetensors"


def published() -> Blip2ForImageTextRetrieval:
    qformer = {**QFORMER, "use_qformer_text_input": True}
    return Blip2ForImageTextRetrieval(
        Blip2Config(
            vision_config=VISION,
            qformer_config=qformer,
            num_query_tokens=QUERIES,
            image_text_hidden_size=20,
        )
    )


def pair(folder: Path, **change: object) -> tuple[VisionLanguageModel, Blip2ForImageTextRetrieval, Part]:
    theirs = published()
    part = blip2_part({**saved(theirs, folder, scale=0.2), **change}, "config.json")
    ours = loaded(part, folder / FILE)
    assert isinstance(ours, VisionLanguageModel)
    return ours, theirs, part


def both(theirs: Blip2ForImageTextRetrieval, text: Text) -> tuple[Tensor, Tensor]:
    """Cosines and matching logits."""
    given = {"input_ids": text.ids, "attention_mask": text.valid.long()}
    itc = theirs(pictures(), use_image_text_matching_head=False, **given).logits_per_image
    return itc, theirs(pictures(), use_image_text_matching_head=True, **given).logits_per_image


def test_scores_and_gradients(tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    text = instructions([9, 3, 6])
    seen = ours.see(pictures())
    assert ours.contrast is not None
    found = ours.contrast(ours.embed_image(seen), ours.embed_text(text)), ours.match_logits(seen, text)
    wanted = both(theirs, text)
    for mine, other in zip(found, wanted, strict=True):
        assert float(other.detach().std()) > 0.03
        assert gap(mine, other) < 1e-5
    names = [
        ("connector.queries", "query_tokens"),
        ("contrast.image.weight", "vision_projection.weight"),
        ("connector.text.position.weight", "embeddings.position_embeddings.weight"),
        ("match.classify.weight", "itm_head.weight"),
    ]
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    sums = [(itc * weight).sum() + (itm * weight[:, :2]).sum() for itc, itm in (found, wanted)]
    grads = torch.autograd.grad(sums[0], [ours.get_parameter(name) for name, _ in names])
    expected = torch.autograd.grad(sums[1], [theirs.get_parameter(name) for _, name in names])
    for mine, other in zip(grads, expected, strict=True):
        assert float(other.abs().max()) > 1e-2
        assert gap(mine, other.reshape(mine.shape)) < 1e-4


@torch.no_grad()
def test_round_trip(tmp_path: Path) -> None:
    _, theirs, part = pair(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    assert same(written(part, again / FILE), read(tmp_path / FILE))
    (again / "config.json").write_text((tmp_path / "config.json").read_text())
    text = instructions([9, 3, 6])
    read_again = Blip2ForImageTextRetrieval.from_pretrained(again).eval()
    for mine, other in zip(both(read_again, text), both(theirs, text), strict=True):
        assert torch.equal(mine, other)


def test_words_of_its_own_are_not_published(tmp_path: Path) -> None:
    ours, _, _ = pair(tmp_path)
    with pytest.raises(ValueError, match="no vocabulary head"):
        ours.logits(torch.zeros(1, 32))
    assert ours.contrast is not None and not ours.contrast.log_scale.any()  # scores are cosines


@torch.no_grad()
def test_changed_facts_are_noticed(tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    text, seen = instructions([9, 3, 6]), ours.see(pictures())
    cosines, matches = both(theirs, text)
    images, texts = ours.embed_image(seen), ours.embed_text(text)
    assert gap(torch.einsum("bqe,me->bm", images, texts) / QUERIES, cosines) > 1e-3  # the best query, not their mean
    blind = Text(text.ids, torch.ones_like(text.valid), text.labels)
    assert gap(ours.match_logits(seen, blind), matches) > 1e-3


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: architectures=\['Blip2TextModel'\]: known here are Blip2For"):
        pair(tmp_path, architectures=["Blip2TextModel"])


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: settings that vlm does not have: model_type='blip' \(known: "):
        pair(tmp_path, model_type="blip")
