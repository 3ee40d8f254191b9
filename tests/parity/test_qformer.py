"""Our Q-Former is transformers' Blip2QFormerModel in all three mask regimes, at random weights."""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from tests.parity.noise import gap, noise
from vlm.model.qformer import QFormer, TextBranch
from vlm.model.weights.blip2 import qformer_table

B, N, C, D, Q, T, V = 3, 7, 20, 32, 5, 6, 60


class Theirs(nn.Module):
    """The pieces of BLIP-2's Q-Former as transformers ships them."""

    def __init__(self) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            cross_attention_frequency=2,
            encoder_hidden_size=C,
            max_position_embeddings=24,
            use_qformer_text_input=True,
        )
        config._attn_implementation = "eager"
        self.query_tokens = nn.Parameter(torch.empty(1, Q, D))
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)


def pair(cross_every: int = 2) -> tuple[QFormer, Theirs]:
    theirs = Theirs().eval()
    noise(theirs)
    text = TextBranch(V, D, 24)
    ours = QFormer(C, D, 4, 4, Q, hidden=48, cross_every=cross_every, text=text).eval()
    weights = qformer_table().to_ours(theirs.state_dict())
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected or cross_every != 2
    assert {name.split(".")[1] for name in missing} <= {"head"} or cross_every != 2, missing
    return ours, theirs


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    maker = torch.Generator().manual_seed(2)
    ids = torch.randint(0, V, (B, T), generator=maker)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, 4:] = valid[1, 2:] = False
    return torch.randn(B, N, C, generator=maker), ids, valid


def queries_of(theirs: Theirs, image: Tensor) -> Tensor:
    expanded = theirs.query_tokens.expand(B, -1, -1)
    return theirs.qformer(query_embeds=expanded, encoder_hidden_states=image).last_hidden_state


def test_queries_alone() -> None:
    ours, theirs = pair()
    image, _, _ = inputs()
    found = ours.query(ours.stack.look(image), B).hidden
    assert gap(found, queries_of(theirs, image)) < 1e-4


def test_text_alone() -> None:
    ours, theirs = pair()
    _, ids, valid = inputs()
    embedded = theirs.embeddings(input_ids=ids)
    expected = theirs.qformer(query_embeds=embedded, query_length=0, attention_mask=valid.long()).last_hidden_state
    assert gap(ours.read(ids, valid)[valid], expected[valid]) < 1e-4


def joint(theirs: Theirs, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    embedded = theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(B, -1, -1))
    return theirs.qformer(
        query_embeds=embedded, query_length=Q, attention_mask=mask, encoder_hidden_states=image
    ).last_hidden_state


def test_fused_with_text() -> None:
    ours, theirs = pair()
    image, ids, valid = inputs()
    mask = torch.cat([torch.ones(B, Q, dtype=torch.bool), valid], 1).long()
    expected = joint(theirs, image, ids, mask)[:, :Q]
    assert gap(ours.fuse(ours.stack.look(image), ids, valid), expected) < 1e-4


def test_writing_from_the_queries_state_equals_one_pass_with_the_mask_of_unilm() -> None:
    ours, theirs = pair()
    image, ids, _ = inputs()
    mask = torch.zeros(B, 1, Q + T, Q + T)
    mask[..., :Q, Q:] = -torch.inf
    mask[..., Q:, Q:] = torch.full((T, T), -torch.inf).triu(1)
    expected = joint(theirs, image, ids, mask)[:, Q:]
    state = ours.query(ours.stack.look(image), B).state
    written = ours.write(ids, torch.ones_like(ids, dtype=torch.bool), state, torch.zeros(B, dtype=torch.long)).hidden
    assert gap(written, expected) < 1e-4


def test_a_changed_fact_is_noticed() -> None:
    ours, theirs = pair(cross_every=1)
    image, _, _ = inputs()
    assert gap(ours.query(ours.stack.look(image), B).hidden, queries_of(theirs, image)) > 1e-3
