"""The vision-language model: one look at the images for every use, splicing, and parts that are not there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.model.small import LONGEST, PATCHES, QUERIES, WIDTH, Eye, blip2, llava, pictures, qformer, texts, words
from vlm.data.batch import Text
from vlm.model.connector import FirstToken, MeanPool
from vlm.model.heads import ContrastiveHead
from vlm.model.language import splice
from vlm.model.text import TextEncoder
from vlm.model.vlm import Seen, VisionLanguageModel, last_valid, need
from vlm.nn.tokens import IMAGE_ID


def cut(text: Text, columns: slice) -> Text:
    return Text(text.ids[:, columns], text.valid[:, columns], text.labels[:, columns])


def test_select_repeats_all_that_was_seen() -> None:
    model, index = blip2(), torch.tensor([1, 0, 1])
    text = words(model, [4, 3, 5])
    once = model.see(pictures()).select(index)
    again = model.see(pictures()[index])
    torch.testing.assert_close(once.soft, again.soft)
    torch.testing.assert_close(model.match_logits(once, text), model.match_logits(again, text))
    torch.testing.assert_close(model.write(once, text).hidden, model.write(again, text).hidden)


def test_select_of_what_has_neither_memory_nor_state() -> None:
    seen = Seen(torch.randn(2, 3, 4)).select(torch.tensor([1, 1]))
    assert seen.memory is None and seen.state is None and len(seen.soft) == 2
    assert torch.equal(seen.soft[0], seen.soft[1])


@pytest.mark.parametrize("kind", [llava, blip2])
@torch.no_grad()
def test_begin_and_proceed_equal_write_on_the_full_text(kind: object) -> None:
    assert callable(kind)
    model: VisionLanguageModel = kind()
    seen, text = model.see(pictures()), words(kind(), [6, 6])
    whole = model.logits(model.write(seen, text).hidden)
    length = text.ids.shape[1]
    for start in range(1 + model.image_tokens, length):
        out = model.write(seen, cut(text, slice(0, start)))
        hidden, state = out.hidden, out.state
        torch.testing.assert_close(model.logits(hidden), whole[:, :start], atol=1e-4, rtol=1e-4)
        for t in range(start, length):
            logits, state = model.proceed(text.ids[:, t : t + 1], state)
            torch.testing.assert_close(logits, whole[:, t], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [llava, blip2])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_of_different_length_go_on_as_if_alone(kind: object, side: str) -> None:
    assert callable(kind)
    model: VisionLanguageModel = kind()
    seen, text, following = model.see(pictures()), words(kind(), [2, 5], side), torch.tensor([[7], [8]])
    out = model.write(seen, text)
    hidden, state = out.hidden, out.state
    logits, state = model.proceed(following, state)
    more, _ = model.proceed(following, state)
    for row in range(2):
        own = texts([torch.cat([text.ids[row][text.valid[row]], following[row], following[row]])])
        alone = model.logits(model.write(seen.select(torch.tensor([row])), own).hidden)[0]
        last = last_valid(hidden, text.valid)[row]
        torch.testing.assert_close(model.logits(last), alone[-3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[row], alone[-2], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(more[row], alone[-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_image_matters_to_its_own_text_alone() -> None:
    for model in (llava(), blip2()):
        text = words(model, [4, 4])
        images = pictures()
        other = torch.stack([images[0], images[1] + 1])
        before, after = (model.write(model.see(pixels), text).hidden for pixels in (images, other))
        torch.testing.assert_close(before[0], after[0])
        assert float((before[1, -1] - after[1, -1]).abs().max()) > 1e-3


def test_splice_by_hand() -> None:
    ids = torch.tensor([[5, IMAGE_ID, IMAGE_ID, 6], [IMAGE_ID, 7, IMAGE_ID, 8]])
    image = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert splice(torch.zeros(2, 4, 1), ids, image, IMAGE_ID)[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 4, 0]]


def test_gradients_reach_image_and_text() -> None:
    ids = torch.tensor([[5, IMAGE_ID, 6]])
    embedded, image = torch.zeros(1, 3, 2, requires_grad=True), torch.zeros(1, 1, 2, requires_grad=True)
    splice(embedded, ids, image, IMAGE_ID).sum().backward()
    assert image.grad is not None and embedded.grad is not None
    assert image.grad.tolist() == [[[1, 1]]]
    assert embedded.grad[0, :, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([[5, 6, 7], [5, IMAGE_ID, IMAGE_ID]], r"\[0, 2\]"),
        ([[IMAGE_ID, IMAGE_ID, IMAGE_ID], [IMAGE_ID, 6, 7]], r"\[3, 1\]"),  # the right number, in the wrong rows
    ],
)
def test_placeholders_that_do_not_fit_the_images_are_refused(rows: list[list[int]], found: str) -> None:
    ids = torch.tensor(rows)
    with pytest.raises(ValueError, match=rf"placeholders.*{found}, for 2 images of 2 tokens"):
        splice(torch.zeros(*ids.shape, 1), ids, torch.zeros(2, 2, 1), IMAGE_ID)


@pytest.mark.parametrize("connector", [MeanPool, FirstToken])
def test_clip_style_embeddings_are_unit_vectors(connector: type[MeanPool]) -> None:
    text = TextEncoder(40, 12, 2, 3, max_tokens=6)
    model = VisionLanguageModel(Eye(), connector(10), text=text, contrast=ContrastiveHead(10, 12, 5))
    seen, caption = model.see(pictures(3)), words(model, [4, 2])
    image, words_of = model.embed_image(seen), model.embed_text(caption)
    assert image.shape == (3, 1, 5) and words_of.shape == (2, 5)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3, 1))
    torch.testing.assert_close(words_of.norm(dim=-1), torch.ones(2))
    contrast = need(model.contrast, "")
    torch.testing.assert_close(contrast(image, words_of), (image[:, 0] @ words_of.T) / 0.07)


def test_text_feature_is_the_state_at_the_last_word() -> None:
    encoder = TextEncoder(40, 12, 2, 3, max_tokens=6).eval()
    text = texts([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6, 7, 8])])
    together = encoder(text.ids, text.valid)
    alone = encoder(text.ids[:1, :3], text.valid[:1, :3])
    torch.testing.assert_close(together[:1], alone)
    with pytest.raises(ValueError, match="7 tokens is longer than the text encoder's 6"):
        encoder(torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.bool))


def test_a_qformers_embeddings() -> None:
    model, text = blip2(), words(blip2(), [3, 5])
    assert model.embed_image(model.see(pictures())).shape == (2, QUERIES, 8)
    embedded = model.embed_text(text)
    torch.testing.assert_close(embedded[:1], model.embed_text(cut(text, slice(0, 3)))[:1])


def test_image_tokens_are_asked_for_by_language_models_only() -> None:
    assert llava().image_tokens == PATCHES
    assert blip2().image_tokens == 0


def test_last_valid_on_either_side() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    valid = torch.tensor([[False, True, True, False], [False, False, True, True]])
    assert last_valid(hidden, valid)[:, 0].tolist() == [2, 7]


def no_heads() -> tuple[VisionLanguageModel, Seen, Text]:
    model = VisionLanguageModel(Eye(), qformer(text=False))
    return model, model.see(pictures()), words(model, [3, 3])


def pooled() -> tuple[VisionLanguageModel, Seen, Text]:
    model = VisionLanguageModel(Eye(), MeanPool(10))
    return model, model.see(pictures()), words(model, [3, 3])


def test_missing_parts_are_named() -> None:
    model, seen, text = no_heads()
    with pytest.raises(ValueError, match="no contrastive head: it was built for other objectives"):
        model.embed_image(seen)
    with pytest.raises(ValueError, match="no text branch"):
        model.embed_text(text)
    with pytest.raises(ValueError, match="no text branch"):
        model.write(seen, text)
    with pytest.raises(ValueError, match="no matching head"):
        headless = VisionLanguageModel(Eye(), qformer())
        headless.match_logits(headless.see(pictures()), text)
    model, seen, text = pooled()
    with pytest.raises(
        ValueError, match=r"ITC without a text encoder needs model\.connector\.kind=qformer, not MeanPool"
    ):
        model.embed_text(text)
    with pytest.raises(ValueError, match=r"ITM needs model\.connector\.kind=qformer, not MeanPool"):
        model.match_logits(seen, text)
    with pytest.raises(ValueError, match=r"LM without a language model needs model\.connector\.kind=qformer"):
        model.write(seen, text)
    with pytest.raises(ValueError, match=r"LM without a language model needs"):
        model.logits(torch.zeros(1, WIDTH))


def test_need_gives_the_module_itself() -> None:
    module = nn.Identity()
    assert need(module, "part") is module


@torch.no_grad()
def test_a_qformer_refuses_to_write_more_than_its_positions() -> None:
    model = blip2()
    state = model.write(model.see(pictures()), words(model, [LONGEST - 1, 3])).state
    logits, state = model.proceed(torch.tensor([[1], [1]]), state)
    with pytest.raises(ValueError, match=f"writes at most {LONGEST} tokens: lower max_new"):
        model.proceed(torch.tensor([[1], [1]]), state)


def test_seen_without_state_is_still_good_for_matching() -> None:
    model, text = blip2(), words(blip2(), [4, 3])
    seen = model.see(pictures())
    logits: Tensor = model.match_logits(replace(seen, state=None), text)
    torch.testing.assert_close(logits, model.match_logits(seen, text))
    assert logits.shape == (2, 2)
