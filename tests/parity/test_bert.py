"""Our BERT is transformers' at random weights, read from disk: states, pooler, gradients, the way back."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from tests.model.small import Eye, pictures
from tests.parity.noise import gap, noise
from vlm.data.batch import Text
from vlm.model.bert import Bert
from vlm.model.connector import MeanPool
from vlm.model.heads import ContrastiveHead
from vlm.model.published.bert import text_part
from vlm.model.published.part import Part
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict, read
from vlm.nn.tokens import IGNORE, count_positions

VOCABULARY, WIDTH, LONGEST = 50, 24, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": LONGEST,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-3,
    "attn_implementation": "eager",
}


@cache
def published() -> BertModel:
    model = BertModel(BertConfig(**SIZES)).eval()
    noise(model, scale=0.3)
    return model


def saved(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as `save_pretrained` writes them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return config, read(Path(folder) / "model.safetensors")


@cache
def files() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return saved(published())


def part_of(**changes: Any) -> Part:
    part = text_part({**files()[0], **changes}, "config.json")
    load_strict(part.module, part.table.to_ours(files()[1]), "model.safetensors")
    return part


def ours(**changes: Any) -> Bert:
    module = part_of(**changes).module
    assert isinstance(module, Bert)
    return module.eval()


def rows(side: str) -> tuple[Tensor, Tensor]:
    """Without id 0, whose row transformers never trains."""
    ids = torch.randint(1, VOCABULARY, (3, LONGEST), generator=torch.Generator().manual_seed(1))
    place, length = torch.arange(LONGEST), torch.tensor([LONGEST, 4, 9])[:, None]
    return ids, place < length if side == "right" else place >= LONGEST - length


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("segmented", [False, True])
def test_states_pooler_and_gradients(side: str, segmented: bool) -> None:
    model, theirs, (ids, valid) = ours(), published(), rows(side)
    segment = torch.arange(LONGEST).expand(3, -1) % 3 if segmented else None
    options = {"attention_mask": valid.long(), "position_ids": count_positions(valid), "token_type_ids": segment}
    out = theirs(ids, **options)
    hidden = model.read(ids, valid, segment)
    assert float(out.last_hidden_state.detach().std()) > 0.3
    assert gap(hidden[valid], out.last_hidden_state[valid]) < 1e-5
    theirs.zero_grad()
    out.last_hidden_state[valid].square().sum().backward()
    hidden[valid].square().sum().backward()
    units = [unit for unit in part_of().table.writing(model.state_dict()) if "pooler" not in unit.ours[0]]
    for unit in units:
        grad = theirs.get_parameter(unit.theirs[0]).grad
        found = model.get_parameter(unit.ours[0]).grad
        assert grad is not None and found is not None
        assert gap(found, grad) < 1e-4 * max(1.0, float(grad.abs().max())), unit.ours
    if side == "right" and not segmented:
        assert gap(model(ids, valid), out.pooler_output) < 1e-5


def test_the_feature_is_that_of_the_first_word_wherever_it_stands() -> None:
    model, (ids, valid) = ours(), rows("left")
    for row in range(3):
        alone = ids[row][valid[row]][None]
        expected = model(alone, torch.ones_like(alone, dtype=torch.bool))
        torch.testing.assert_close(model(ids, valid)[row], expected[0])


def test_round_trip() -> None:
    part, (_, tensors) = part_of(), files()
    back = part.table.to_theirs(part.module.state_dict())
    assert set(back) == set(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in back.items())
    BertModel(BertConfig(**SIZES)).load_state_dict(back)


@pytest.mark.parametrize("changes", [{"layer_norm_eps": 1e-12}, {"num_attention_heads": 6}])
def test_other_settings_are_noticed(changes: dict[str, Any]) -> None:
    ids, valid = rows("right")
    wanted = published()(ids, attention_mask=valid.long()).last_hidden_state[valid]
    assert gap(ours(**changes).read(ids, valid)[valid], wanted) > 1e-3


def test_another_segment_or_seen_padding_is_noticed() -> None:
    model, (ids, valid) = ours(), rows("right")
    wanted = published()(ids, attention_mask=valid.long()).last_hidden_state[valid]
    assert gap(model.read(ids, valid, torch.ones_like(ids))[valid], wanted) > 1e-3
    assert gap(model.read(ids, torch.ones_like(valid))[valid], wanted) > 1e-3


def test_the_encoder_inside_a_model_with_heads_and_old_names_of_norms() -> None:
    """Masked words: "bert." before all names, heads that are not the encoder's, no pooler."""
    theirs = BertForMaskedLM(BertConfig(**SIZES)).eval()
    noise(theirs, scale=0.3)
    config, tensors = saved(theirs)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for name, x in tensors.items()
    }
    old["bert.embeddings.position_ids"], old["bert.pooler.dense.weight"] = torch.zeros(1), torch.zeros(1)
    part = text_part(config, "config.json", pooler=False)
    load_strict(part.module, part.table.to_ours(old), "model.safetensors")
    assert isinstance(part.module, Bert)
    ids, valid = rows("right")
    wanted = theirs.bert(ids, attention_mask=valid.long()).last_hidden_state
    found = part.module.eval().read(ids, valid)
    assert gap(found[valid], wanted[valid]) < 1e-5
    assert torch.equal(part.module(ids, valid), found[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, r"config\.json: model_type='roberta' is no text encoder known here \(bert\)"),
        ({"hidden_act": "relu"}, r"settings that vlm does not have: hidden_act='relu' \(known: 'gelu'\)"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ],
)
def test_other_families_and_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_part({**files()[0], **changes}, "config.json")


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="a text of 13 tokens is longer than BERT's 12"):
        ours()(torch.zeros(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.bool))


def test_it_is_the_text_side_of_a_contrastive_model() -> None:
    model = VisionLanguageModel(Eye(), MeanPool(10), text=ours(), contrast=ContrastiveHead(10, WIDTH, 5))
    ids, valid = rows("right")
    vectors = model.embed_text(Text(ids, valid, torch.full_like(ids, IGNORE)))
    assert vectors.shape == (3, 5) and model.embed_image(model.see(pictures())).shape == (2, 1, 5)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
