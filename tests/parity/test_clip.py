"""Our two towers are open_clip's CLIP: logits, gradients, and the way back, at random weights."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from tests.parity.noise import gap, noise
from vlm.data.batch import Text
from vlm.model.connector import FirstToken, MeanPool
from vlm.model.heads import ContrastiveHead
from vlm.model.text import TextEncoder
from vlm.model.vision import from_open_clip
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.open_clip import open_clip_table
from vlm.nn.ffn import QuickGELU
from vlm.nn.tokens import IGNORE

VOCABULARY, LONGEST, WIDTH, EMBED = 70, 10, 24, 16


def pair(quick: bool, ours_quick: bool | None = None) -> tuple[VisionLanguageModel, CLIP]:
    vision = CLIPVisionCfg(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=LONGEST, vocab_size=VOCABULARY, width=WIDTH, heads=4, layers=3)
    theirs = CLIP(EMBED, vision, text, quick_gelu=quick).eval()
    noise(theirs, scale=0.2)
    theirs.logit_scale.data.fill_(2.3)
    activation = QuickGELU if (quick if ours_quick is None else ours_quick) else torch.nn.GELU
    ours = VisionLanguageModel(
        from_open_clip(theirs),
        FirstToken(32),
        text=TextEncoder(VOCABULARY, WIDTH, 3, 4, LONGEST, activation),
        contrast=ContrastiveHead(32, WIDTH, EMBED),
    ).eval()
    missing, unexpected = ours.load_state_dict(open_clip_table().to_ours(theirs.state_dict()), strict=False)
    assert not unexpected
    assert all(name.startswith("vision.") for name in missing)  # open_clip's own module, shared
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor, Text]:
    """Texts of different length that end with the largest id, where open_clip looks for the end."""
    maker = torch.Generator().manual_seed(3)
    ids = torch.zeros(5, LONGEST, dtype=torch.long)
    valid = torch.zeros(5, LONGEST, dtype=torch.bool)
    for row, length in enumerate((4, LONGEST, 2, 7, 5)):
        ids[row, : length - 1] = torch.randint(1, VOCABULARY - 1, (length - 1,), generator=maker)
        ids[row, length - 1] = VOCABULARY - 1
        valid[row, :length] = True
    return torch.randn(4, 3, 32, 32, generator=maker), ids, Text(ids, valid, torch.full_like(ids, IGNORE))


def logits(model: VisionLanguageModel, images: Tensor, text: Text) -> Tensor:
    assert model.contrast is not None
    found: Tensor = model.contrast(model.embed_image(model.see(images)), model.embed_text(text))
    return found


def expected(model: CLIP, images: Tensor, ids: Tensor) -> Tensor:
    found: Tensor = model.get_logits(images, ids)[0]
    return found


@pytest.mark.parametrize("quick", [True, False])
def test_logits(quick: bool) -> None:
    ours, theirs = pair(quick)
    images, ids, text = inputs()
    wanted = expected(theirs, images, ids)
    assert wanted.shape == (4, 5) and float(wanted.std()) > 0.5
    assert gap(logits(ours, images, text), wanted) < 1e-4


@pytest.mark.parametrize("quick", [True, False])
def test_round_trip(quick: bool) -> None:
    ours, theirs = pair(quick)
    own = {name: value for name, value in ours.state_dict().items() if not name.startswith("vision.")}
    back = open_clip_table().to_theirs(own)
    published = {
        name: value for name, value in theirs.state_dict().items() if name == "visual.proj" or "visual." not in name
    }
    assert set(back) == set(published)
    assert all(torch.equal(value, published[name]) for name, value in back.items())


def test_gradients() -> None:
    ours, theirs = pair(True)
    images, ids, text = inputs()
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(8))
    mine = (
        ours.get_parameter("text.stack.blocks.1.mixer.value.weight"),
        ours.get_parameter("contrast.image.weight"),
        ours.get_parameter("vision.backbone.visual.conv1.weight"),
        ours.get_parameter("contrast.log_scale"),
    )
    found = torch.autograd.grad((logits(ours, images, text) * weight).sum(), mine)
    other = (theirs.transformer.resblocks[1].attn.in_proj_weight, theirs.visual.proj, theirs.visual.conv1.weight)
    wanted = torch.autograd.grad((expected(theirs, images, ids) * weight).sum(), (*other, theirs.logit_scale))
    assert gap(found[0], wanted[0][2 * WIDTH :]) < 1e-4
    assert gap(found[1], wanted[1].T) < 1e-4
    assert gap(found[2], wanted[2]) < 1e-4
    assert gap(found[3], wanted[3]) < 1e-4


@torch.no_grad()
def test_changed_facts_are_noticed() -> None:
    images, ids, text = inputs()
    other_activation, theirs = pair(True, ours_quick=False)
    wanted = expected(theirs, images, ids)
    assert gap(logits(other_activation, images, text), wanted) > 1e-3
    ours, theirs = pair(True)
    cut = Text(text.ids, text.valid & (torch.arange(LONGEST) < 4), text.labels)
    assert gap(logits(ours, images, cut), wanted) > 1e-3
    ours.connector = MeanPool(32)
    assert gap(logits(ours, images, text), wanted) > 1e-3
