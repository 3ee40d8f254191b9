"""Our BLIP-2 stage 1 (ITC + ITM + LM) is the published recipe, worked out again here from transformers' pieces.

The recipe makes separate passes: the queries alone and the text alone for ITC, three times the batch of queries with
text for ITM, and queries with text under the mask of UniLM for LM. Ours shares the query pass and the image's keys and
values between them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from tests.model.small import LONGEST, QUERIES, VOCABULARY, WIDTH, Eye, pictures, qformer
from tests.parity.noise import gap, noise
from vlm.data.batch import Batch, Text
from vlm.model.heads import ContrastiveHead, MatchingHead
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.blip2 import qformer_table
from vlm.nn.tokens import IGNORE
from vlm.train.task import Itc, Itm, Lm, Losses, Task

B, T, EMBED, BOS, DEC, SMOOTHING = 4, 7, 8, 1, 2, 0.1


class Theirs(nn.Module):
    """BLIP-2's Q-Former as transformers ships it, with the heads that stage 1 adds."""

    def __init__(self) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            cross_attention_frequency=2,
            encoder_hidden_size=10,
            max_position_embeddings=LONGEST,
            use_qformer_text_input=True,
        )
        config._attn_implementation = "eager"
        self.query_tokens = nn.Parameter(torch.empty(1, QUERIES, WIDTH))
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)
        self.image, self.text = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
        self.match, self.vocabulary = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, VOCABULARY)
        self.temperature = nn.Parameter(torch.empty(()))


class Recipe(NamedTuple):
    """The published facts, each of which can be changed to see that it matters."""

    smoothing: float = SMOOTHING
    causal: bool = True
    hard: bool = True
    best_query: bool = True


def recompute(theirs: Theirs, image: Tensor, text: Text, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """ITC, ITM and LM of a batch with one caption per image."""
    queries = theirs.query_tokens.expand(B, -1, -1)
    looked = theirs.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    mask = text.valid.long()
    words = theirs.embeddings(input_ids=text.ids)
    read = theirs.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state[:, 0]
    pictured, said = normalize(theirs.image(looked), dim=-1), normalize(theirs.text(read), dim=-1)
    scores = torch.einsum("iqe,te->itq", pictured, said)
    scores = (scores.amax(2) if recipe.best_query else scores.mean(2)) / theirs.temperature
    target = torch.arange(B)
    itc = sum(cross_entropy(s, target, label_smoothing=recipe.smoothing) for s in (scores, scores.T)) / 2
    assert isinstance(itc, Tensor)
    return itc, itm(theirs, image, text, scores.detach(), recipe), lm(theirs, image, text, recipe)


def itm(theirs: Theirs, image: Tensor, text: Text, scores: Tensor, recipe: Recipe) -> Tensor:
    masked = scores - 10_000 * torch.eye(B)
    wrong_text, wrong_image = masked.argmax(1), masked.argmax(0)
    if not recipe.hard:
        wrong_text = wrong_image = torch.arange(B).roll(1)
    images = torch.cat([image, image[wrong_image], image])
    ids = torch.cat([text.ids, text.ids, text.ids[wrong_text]])
    valid = torch.cat([text.valid, text.valid, text.valid[wrong_text]])
    mask = torch.cat([torch.ones(3 * B, QUERIES), valid], 1)
    fused = joint(theirs, images, ids, mask)[:, :QUERIES]
    match = torch.cat([torch.ones(B), torch.zeros(2 * B)]).long()
    return cross_entropy(theirs.match(fused).mean(1), match)


def lm(theirs: Theirs, image: Tensor, text: Text, recipe: Recipe) -> Tensor:
    ids = text.ids.clone()
    ids[:, 0] = DEC
    hidden = torch.zeros(B, 1, QUERIES + T, QUERIES + T)
    hidden[..., :QUERIES, QUERIES:] = -torch.inf
    if recipe.causal:
        hidden[..., QUERIES:, QUERIES:] = torch.full((T, T), -torch.inf).triu(1)
    logits = theirs.vocabulary(joint(theirs, image, ids, hidden)[:, QUERIES:])
    labels = text.labels[:, 1:].flatten()
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, label_smoothing=recipe.smoothing)


def joint(theirs: Theirs, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    both = theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(len(ids), -1, -1))
    found: Tensor = theirs.qformer(
        query_embeds=both, query_length=QUERIES, attention_mask=mask, encoder_hidden_states=image
    ).last_hidden_state
    return found


@pytest.fixture(autouse=True)
def hardest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both sides take the hardest negative instead of drawing one."""
    monkeypatch.setattr(torch, "multinomial", lambda weight, _count, generator=None: weight.argmax(1, keepdim=True))
    yield


def published(name: str) -> bool:
    return name.split(".")[0] in ("query_tokens", "embeddings", "qformer")


def pair() -> tuple[VisionLanguageModel, Theirs]:
    theirs = Theirs().eval()
    noise(theirs, scale=0.3)
    theirs.temperature.data.fill_(0.07)
    contrast, match = ContrastiveHead(WIDTH, WIDTH, EMBED, bias=True), MatchingHead(WIDTH)
    ours = VisionLanguageModel(Eye(), qformer(), contrast=contrast, match=match).eval()
    noise(ours.vision, scale=1.0)
    weights = qformer_table().to_ours({k: v for k, v in theirs.state_dict().items() if published(k)})
    missing, unexpected = ours.connector.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) == {"text.head.weight", "text.head.bias"}
    ours.connector.text.head.load_state_dict(theirs.vocabulary.state_dict())
    contrast.image.load_state_dict(theirs.image.state_dict())
    contrast.text.load_state_dict(theirs.text.state_dict())
    match.classify.load_state_dict(theirs.match.state_dict())
    contrast.log_scale.data.copy_(-theirs.temperature.detach().log())
    return ours, theirs


def batch() -> Batch:
    valid = torch.arange(T)[None] < torch.tensor([T, 4, 2, 6])[:, None]
    ids = torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(2)).masked_fill(~valid, 0)
    ids[:, 0] = BOS
    labels = ids.masked_fill(~valid, IGNORE)
    labels[:, 0] = IGNORE
    names = [str(i) for i in range(B)]
    return Batch(
        keys=names,
        images=pictures(B),
        image_ids=names,
        owner=torch.arange(B),
        strings=names,
        captions=Text(ids, valid, labels),
        prompts=None,
        positive=torch.eye(B, dtype=torch.bool),
    )


def both(recipe: Recipe) -> tuple[VisionLanguageModel, Losses, Theirs, tuple[Tensor, Tensor, Tensor]]:
    ours, theirs = pair()
    objectives = [Itc(label_smoothing=SMOOTHING), Itm(), Lm(VOCABULARY, DEC, label_smoothing=SMOOTHING)]
    losses = Task(ours, objectives)(batch())
    image = ours.vision(batch().images).detach()
    return ours, losses, theirs, recompute(theirs, image, batch().captions, recipe)


def test_each_loss() -> None:
    _, losses, _, wanted = both(Recipe())
    assert list(losses.each) == ["itc", "itm", "lm"]
    for found, expected in zip(losses.each.values(), wanted, strict=True):
        assert gap(found, expected) < 1e-5
    assert gap(losses.total, torch.stack(wanted).sum()) < 1e-5


def test_every_gradient() -> None:
    ours, losses, theirs, wanted = both(Recipe())
    losses.total.backward()
    torch.stack(wanted).sum().backward()
    grads = {name: parameter.grad for name, parameter in ours.connector.named_parameters() if "head" not in name}
    assert all(grad is not None for grad in grads.values())
    found = qformer_table().to_theirs({name: grad for name, grad in grads.items() if grad is not None})
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(found) == {name for name in expected if published(name)}
    for name, grad in found.items():
        other = expected[name]
        assert other is not None and gap(grad, other) < 1e-4, name
    head, match = ours.contrast, ours.match
    assert head is not None and match is not None
    for mine, name in [(head.image, "image"), (head.text, "text"), (match.classify, "match")]:
        assert mine.weight.grad is not None and gap(mine.weight.grad, expected[f"{name}.weight"]) < 1e-4
    # d/d temperature = d/d log_scale * d log_scale / d temperature
    assert head.log_scale.grad is not None
    assert gap(-head.log_scale.grad / theirs.temperature, expected["temperature"]) < 1e-4


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (Recipe(smoothing=0.0), "itc"),
        (Recipe(best_query=False), "itc"),
        (Recipe(hard=False), "itm"),
        (Recipe(smoothing=0.0), "lm"),
        (Recipe(causal=False), "lm"),
    ],
)
def test_changed_facts_are_noticed(change: Recipe, loss: str) -> None:
    _, losses, _, wanted = both(change)
    assert gap(losses.each[loss], dict(zip(("itc", "itm", "lm"), wanted, strict=True))[loss]) > 1e-3
