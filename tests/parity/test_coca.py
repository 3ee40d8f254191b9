"""Our CoCa is open_clip's: features, caption logits, both losses, gradients, captions, and the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa as Published
from open_clip.loss import CoCaLoss
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.noise import gap, noise
from tests.parity.published import loaded, same, written
from vlm.data.batch import Text
from vlm.loss.contrastive import contrastive
from vlm.loss.language import language, supervised
from vlm.model.beam import Beams
from vlm.model.coca import CoCa
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.published.open_clip import open_clip_part
from vlm.model.published.part import Part
from vlm.nn.tokens import IGNORE

VOCABULARY, LONGEST, WIDTH, START, END = 40, 9, 24, 38, 39
TEXT = {"context_length": LONGEST, "vocab_size": VOCABULARY, "width": WIDTH, "heads": 3, "layers": 2}
VISION = {
    "image_size": 32,
    "layers": 2,
    "width": 32,
    "head_width": 8,
    "patch_size": 8,
    "attentional_pool": True,
    "attn_pooler_queries": 7,
    "attn_pooler_heads": 3,
    "output_tokens": True,
}
CONFIG: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": VISION,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "layers": 3, "heads": 2},
    "custom_text": True,
}


def pair(folder: Path, **vision: Any) -> tuple[CoCa, Published, Part]:
    config = {**CONFIG, "vision_cfg": {**VISION, **vision}}
    theirs = Published(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    noise(theirs, scale=0.2)
    theirs.logit_scale.data.fill_(2.3)
    theirs.visual.image_mean, theirs.visual.image_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
    save_config_for_hf(theirs, folder / "open_clip_config.json", config)
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    part = open_clip_part(json.loads((folder / "open_clip_config.json").read_text()), "open_clip_config.json")
    ours = loaded(part, folder / "open_clip_model.safetensors")
    assert isinstance(ours, CoCa)
    return ours, theirs, part


def inputs() -> tuple[Tensor, Text]:
    """As many texts as pictures; one fills all places, none is shorter than two words."""
    maker = torch.Generator().manual_seed(3)
    ids = torch.zeros(4, LONGEST, dtype=torch.long)
    valid = torch.zeros(4, LONGEST, dtype=torch.bool)
    for row, length in enumerate((4, LONGEST, 2, 7)):
        ids[row, :length] = torch.randint(1, START, (length,), generator=maker)
        ids[row, 0], ids[row, length - 1] = START, END
        valid[row, :length] = True
    labels = ids.masked_fill(~valid, IGNORE)
    labels[:, 0] = IGNORE
    colours = 4 * torch.randn(4, 3, 1, 1, generator=maker)  # so that captions differ
    return colours + torch.randn(4, 3, 32, 32, generator=maker), Text(ids, valid, labels)


def run(model: CoCa, images: Tensor, text: Text) -> tuple[Tensor, ...]:
    """Features, caption logits, both losses."""
    seen = model.see(images)
    assert model.contrast is not None
    image, words = model.embed_image(seen), model.embed_text(text)
    itc = contrastive(model.contrast(image, words), torch.eye(len(images), dtype=torch.bool))
    hidden = model.write(seen, text).hidden
    states, target = supervised(hidden, text.labels)
    return image[:, 0], words, model.logits(hidden)[:, :-1], itc, language(model.logits(states), target)


def expected(model: Published, images: Tensor, text: Text) -> tuple[Tensor, ...]:
    out = model(images, text.ids)
    labels = out.pop("labels")
    itc, caption = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**out, labels=labels)
    return out["image_features"], out["text_features"], out["logits"], itc, caption / 2


@pytest.mark.parametrize("width", [32, WIDTH])
@torch.no_grad()
def test_features_logits_and_losses(width: int, tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path, width=width)
    images, text = inputs()
    found, wanted = run(ours, images, text), expected(theirs, images, text)
    assert float(wanted[2].std()) > 0.3
    shown = text.valid[:, :-1]
    for a, b in zip(
        (*found[:2], found[2][shown], *found[3:]), (*wanted[:2], wanted[2][shown], *wanted[3:]), strict=True
    ):
        assert a.shape == b.shape
        assert gap(a, b) < 1e-4


def test_gradients(tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    mine = [
        ours.get_parameter("connector.queries"),
        ours.get_parameter("caption.class_token"),
        ours.get_parameter("caption.decoder.blocks.3.mixer.image_norm.weight"),
        ours.get_parameter("vision.backbone.visual.conv1.weight"),
    ]
    other = [
        theirs.visual.attn_pool.query,
        theirs.text.cls_emb,
        theirs.text_decoder.cross_attn[1].ln_1_kv.weight,
        theirs.visual.conv1.weight,
    ]
    found, wanted = run(ours, *inputs()), expected(theirs, *inputs())
    for a, b in zip(
        torch.autograd.grad(found[3] + 2 * found[4], mine),
        torch.autograd.grad(wanted[3] + 2 * wanted[4], other),
        strict=True,
    ):
        assert float(b.abs().max()) > 1e-3
        assert gap(a, b) < 1e-4


@torch.no_grad()
def test_the_feature_does_not_depend_on_how_far_a_batch_is_padded(tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    images, text = inputs()
    wanted = expected(theirs, images, text)[1]
    for row, length in enumerate(text.valid.sum(1).tolist()):
        alone = Text(text.ids[row : row + 1, :length], text.valid[row : row + 1, :length], text.labels[:1, :length])
        assert gap(ours.embed_text(alone), wanted[row : row + 1]) < 1e-4


@torch.no_grad()
def test_the_way_back(tmp_path: Path) -> None:
    ours, theirs, part = pair(tmp_path)
    assert same(written(part, tmp_path / "back.safetensors"), theirs.state_dict())


@pytest.mark.parametrize("fact", ["class token", "first padding", "query", "order"])
@torch.no_grad()
def test_changed_facts_are_noticed(fact: str, tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    images, text = inputs()
    wanted = expected(theirs, images, text)
    if fact == "class token":  # the mask as it should have been
        theirs.text.correct_cls_mask = True
        wanted = expected(theirs, images, text)
    elif fact == "first padding":
        ours.caption.pad = 5
    elif fact == "query":
        ours.connector.queries.data = ours.connector.queries.flip(0)
    else:
        blocks = ours.caption.decoder.blocks
        blocks[2], blocks[4] = blocks[4], blocks[2]
    found = run(ours, images, text)
    place = {"class token": 1, "first padding": 1, "query": 0, "order": 2}[fact]
    assert gap(found[place], wanted[place]) > 1e-3


@torch.no_grad()
def plain_loop(model: Published, image: Tensor, new: int) -> list[int]:
    """Greedy over open_clip's whole forward pass, because its own `generate` needs an older transformers."""
    ids = [START]
    for _ in range(new):
        logits = model(image[None], torch.tensor([ids]), output_labels=False)["logits"][0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == END:
            break
    return [token for token in ids[1:] if token != END]


def caption(model: CoCa, images: Tensor, prompt: Text, decoding: Decoding) -> list[list[int]]:
    with torch.no_grad():
        out = model.write(model.see(images), prompt)
        first = model.logits(out.hidden[:, -1])
        return generate(model.proceed, first, out.state, prompt.ids, END, decoding)


def start(count: int) -> Text:
    ids = torch.full((count, 1), START)
    return Text(ids, torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, IGNORE))


def test_greedy_captions(tmp_path: Path) -> None:
    ours, theirs, _ = pair(tmp_path)
    images, prompt = inputs()[0], start(4)
    wanted = [plain_loop(theirs, image, LONGEST - 1) for image in images]
    assert len({tuple(row) for row in wanted}) > 1
    assert caption(ours, images, prompt, Sampling(max_new=LONGEST - 1)) == wanted
    assert caption(ours, images, prompt, Beams(1, max_new=LONGEST - 1)) == wanted


def test_beams_keep_to_their_picture(tmp_path: Path) -> None:
    ours, _, _ = pair(tmp_path)
    images, beams = inputs()[0][[0, 2]], Beams(3, max_new=5)
    together = caption(ours, images, start(2), beams)
    assert len({tuple(row) for row in together}) > 1
    assert [caption(ours, image[None], start(1), beams)[0] for image in images] == together


@torch.no_grad()
def test_prompts_of_different_length_are_as_alone(tmp_path: Path) -> None:
    ours, _, _ = pair(tmp_path)
    images, _ = inputs()
    ids = torch.tensor([[0, 0, START], [START, 4, 9]])
    both = Text(ids, ids > 0, torch.full_like(ids, IGNORE))
    together = caption(ours, images[:2], both, Sampling(max_new=4))
    for row, first in enumerate((2, 0)):
        one = Text(*(part[row : row + 1, first:] for part in (both.ids, both.valid, both.labels)))
        assert caption(ours, images[row : row + 1], one, Sampling(max_new=4)) == together[row : row + 1]


def test_texts_that_are_too_long_and_what_it_cannot_do(tmp_path: Path) -> None:
    ours, _, _ = pair(tmp_path)
    images, text = inputs()
    long = torch.ones(1, LONGEST + 1, dtype=torch.long)
    prompt = Text(long, long > 0, long)
    with pytest.raises(ValueError, match=f"this CoCa reads and writes {LONGEST} tokens, not {LONGEST + 1}"):
        ours.embed_text(prompt)
    with pytest.raises(ValueError, match=f"this CoCa reads and writes {LONGEST} tokens, not {LONGEST + 1}"):
        ours.write(ours.see(images[:1]), prompt)
    with pytest.raises(ValueError, match="CoCa writes about an image, and was given none"):
        ours.write(None, text)
    with pytest.raises(ValueError, match="CoCa reads no instruction"):
        ours.see(images, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {**TEXT, "hf_model_name": "roberta-base"}}, r"text_cfg: .*hf_model_name='roberta-base'"),
        ({"vision_cfg": {**VISION, "attentional_pool": "cascade"}}, r"vision_cfg: .*attentional_pool='cascade'"),
        ({"multimodal_cfg": {**TEXT, "width": 32}}, "embed_dim, width and vocab_size of .* have to be equal"),
        ({"multimodal_cfg": {**TEXT, "wings": 2}}, "multimodal_cfg: no settings of open_clip's: wings"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"open_clip_config.json: model_cfg: .*{message}"):
        open_clip_part({"model_cfg": {**CONFIG, **change}}, "open_clip_config.json")
