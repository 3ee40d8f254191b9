"""Our image tower, projector and decoder together are transformers' LLaVA: logits, loss, gradients, both layouts."""

from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.parity.noise import gap, noise
from vlm.data.batch import Text
from vlm.loss.language import language, supervised
from vlm.model.connector import MlpConnector
from vlm.model.language import llama
from vlm.model.vision import from_open_clip
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict
from vlm.model.weights.llama import llama_table
from vlm.model.weights.llava import llava_table
from vlm.nn.tokens import IGNORE, IMAGE_ID

TABLE = llava_table(llama_table(tied=False))
VOCABULARY, THEIR_IMAGE_ID, PATCHES, WIDTH = 99, 91, 16, 40


def published() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=THEIR_IMAGE_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    noise(model, scale=0.15)
    return model


def tower(quick_gelu: bool) -> CLIP:
    vision = CLIPVisionCfg(layers=3, width=48, head_width=12, mlp_ratio=2.0, patch_size=7, image_size=28)
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=8, heads=2, layers=1)
    model = CLIP(16, vision, text, quick_gelu=quick_gelu)
    model.visual.proj = None
    return model


def pair(quick_gelu: bool = True, **options: Any) -> tuple[VisionLanguageModel, LlavaForConditionalGeneration]:
    theirs = published()
    vision = from_open_clip(tower(quick_gelu), **{"layer": -2, "class_token": "drop", **options})
    decoder = llama(VOCABULARY, WIDTH, 2, 4, 2, hidden=72, tied=False)
    ours = VisionLanguageModel(vision, MlpConnector(48, WIDTH, vision.tokens, depth=2), language=decoder).eval()
    load_strict(ours, TABLE.to_ours(theirs.state_dict()), "transformers")
    return ours, theirs


def inputs() -> tuple[Tensor, Text]:
    """Two prompts with the image in the middle, the second one shorter; the last words are supervised."""
    maker = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 90, (2, 12 + PATCHES), generator=maker)
    valid = torch.ones_like(ids, dtype=torch.bool)
    ids[0, 3 : 3 + PATCHES] = IMAGE_ID
    ids[1, 1 : 1 + PATCHES] = IMAGE_ID
    valid[1, -5:] = False
    labels = ids.masked_fill(~valid | (ids == IMAGE_ID), IGNORE)
    labels[:, : 5 + PATCHES] = IGNORE
    return torch.randn(2, 3, 28, 28, generator=maker), Text(ids, valid, labels)


def run(model: VisionLanguageModel, images: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    hidden = model.write(model.see(images), text).hidden
    states, target = supervised(hidden, text.labels)
    return model.logits(hidden), language(model.logits(states), target)


def expected(model: LlavaForConditionalGeneration, images: Tensor, text: Text) -> tuple[Tensor, Tensor]:
    ids = text.ids.masked_fill(text.ids == IMAGE_ID, THEIR_IMAGE_ID)
    out = model(input_ids=ids, pixel_values=images, attention_mask=text.valid.long(), labels=text.labels)
    return out.logits, out.loss


def test_logits_loss_and_gradients() -> None:
    ours, theirs = pair()
    images, text = inputs()
    (logits, loss), (wanted, wanted_loss) = run(ours, images, text), expected(theirs, images, text)
    assert float(wanted.detach().std()) > 0.3
    assert gap(logits[text.valid], wanted[text.valid]) < 1e-4
    assert gap(loss, wanted_loss) < 1e-5
    loss.backward()
    wanted_loss.backward()
    pairs = [
        ("connector.layers.0.weight", "model.multi_modal_projector.linear_1.weight"),
        ("vision.backbone.visual.conv1.weight", "embeddings.patch_embedding.weight"),
        ("language.stack.blocks.0.mixer.query.weight", "model.language_model.layers.0.self_attn.q_proj.weight"),
    ]
    for mine, other in pairs:
        found = ours.get_parameter(mine).grad
        wanted_grad = next(p.grad for name, p in theirs.named_parameters() if name.endswith(other))
        assert found is not None and wanted_grad is not None
        assert float(wanted_grad.abs().max()) > 1e-3
        assert gap(found, wanted_grad) < 1e-4


def hub(theirs: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """As files on the hub name them."""
    levels = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.vision_model.": "vision_tower.vision_model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    renamed = {}
    for name, value in theirs.state_dict().items():
        old = next(level for level in levels if name.startswith(level))
        renamed[levels[old] + name.removeprefix(old)] = value
    return renamed


def test_round_trip() -> None:
    ours, theirs = pair()
    back = TABLE.to_theirs(ours.state_dict())
    whole = {name.replace("tower.vision_model.", "tower."): value for name, value in hub(theirs).items()}
    assert set(back) == set(whole)
    assert all(torch.equal(value, whole[name]) for name, value in back.items())


def test_the_layout_of_files_is_read_too() -> None:
    theirs = published()
    found, expected_ours = TABLE.to_ours(hub(theirs)), TABLE.to_ours(theirs.state_dict())
    assert not set(hub(theirs)) & set(theirs.state_dict())
    assert set(found) == set(expected_ours)
    assert all(torch.equal(found[name], expected_ours[name]) for name in found)


def test_leftovers_are_listed() -> None:
    theirs = published().state_dict()
    strangers = {"image_newline": torch.zeros(1), "model.multi_modal_projector.linear_3.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"llava: published .*: image_newline, model\..*linear_3\.weight$"):
        TABLE.to_ours({**theirs, **strangers})
    with pytest.raises(ValueError, match=r"llava: tensors of ours .*: contrast\.log_scale$"):
        TABLE.to_theirs({**TABLE.to_ours(theirs), "contrast.log_scale": torch.zeros(())})


@pytest.mark.parametrize("change", [{"layer": -1}, {"layer": -3}, {"quick_gelu": False}])
@torch.no_grad()
def test_changed_facts_are_noticed(change: dict[str, Any]) -> None:
    ours, theirs = pair(**change)
    images, text = inputs()
    assert gap(run(ours, images, text)[0][text.valid], expected(theirs, images, text)[0][text.valid]) > 1e-3


@torch.no_grad()
def test_a_kept_class_token_does_not_fit_the_placeholders() -> None:
    ours, _ = pair(class_token="keep")
    images, text = inputs()
    assert ours.image_tokens == PATCHES + 1
    with pytest.raises(ValueError, match="placeholders"):
        run(ours, images, text)
