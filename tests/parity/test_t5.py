"""Our encoder-decoder is transformers' T5 at random weights, read from disk: 1.0 (ReLU, tied), 1.1 and Flan (gated)."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.model.small import Eye, pictures
from tests.parity.noise import gap, noise
from vlm.data.batch import Text
from vlm.loss.language import language, supervised
from vlm.model.beam import Beams
from vlm.model.connector import MlpConnector
from vlm.model.generate import Decoding, Sampling, generate
from vlm.model.language import splice
from vlm.model.published.language import language_part
from vlm.model.published.part import Part
from vlm.model.seq2seq import EncoderDecoder
from vlm.model.vlm import VisionLanguageModel, last_valid
from vlm.model.weights.files import load_strict, read
from vlm.nn.tokens import IGNORE, IMAGE_ID

VOCABULARY, WIDTH, READ, WRITTEN = 60, 32, 29, 13
KINDS = {
    "1.0": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "lavis": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dense_act_fn": "gelu"},
}


@cache
def published(kind: str) -> T5ForConditionalGeneration:
    """Heads that do not divide the width, fewer blocks that write than read, distances beyond the last bucket.

    (More that write than read cannot be decoded by transformers 5: its cache has too few layers.)
    """
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        layer_norm_epsilon=1e-3,
        decoder_start_token_id=0,
        attn_implementation="eager",
        **KINDS[kind],
    )
    model = T5ForConditionalGeneration(config).eval()
    if kind != "1.0":  # transformers 5 ties the head in memory, but keeps the two apart that a file holds
        model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
    noise(model, scale=0.2)
    return model


@cache
def files(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as `save_pretrained` writes them."""
    with TemporaryDirectory() as folder:
        published(kind).save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return config, read(Path(folder) / "model.safetensors")


def part_of(kind: str, **changes: Any) -> Part:
    config, _ = files(kind)
    return language_part({**config, **changes}, "config.json")


def ours(kind: str, **changes: Any) -> VisionLanguageModel:
    part = part_of(kind, **changes)
    load_strict(part.module, part.table.to_ours(files(kind)[1]), "model.safetensors")
    assert isinstance(part.module, EncoderDecoder)
    return VisionLanguageModel(language=part.module).eval()


def rows(lengths: list[int], side: str, seed: int) -> tuple[Tensor, Tensor]:
    longest = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(seed))
    place, count = torch.arange(longest), torch.tensor(lengths)[:, None]
    valid = place < count if side == "right" else place >= longest - count
    return ids.masked_fill(~valid, 0), valid


def text(side: str = "right", lengths: tuple[int, ...] = (READ, 5, 17), padded: bool = True) -> Text:
    """What is read, of different lengths, and replies with their start token."""
    ids, valid = rows(list(lengths), side, 1)
    replies, replied = rows([WRITTEN - 4 * i if padded else WRITTEN for i in range(len(lengths))], "right", 2)
    replies[:, 0] = 0
    labels = replies.masked_fill(~replied, IGNORE)
    labels[:, 0] = IGNORE
    reply = Text(replies, replied, labels, bool(replied.all()))
    return Text(ids, valid, torch.full_like(ids, IGNORE), bool(valid.all()), reply)


def logits(model: VisionLanguageModel, given: Text) -> Tensor:
    return model.logits(model.write(None, given).hidden)[given.written.valid]


def expected(model: T5ForConditionalGeneration, given: Text) -> Tensor:
    reply = given.written
    out = model(
        input_ids=given.ids,
        attention_mask=given.valid.long(),
        decoder_input_ids=reply.ids,
        decoder_attention_mask=reply.valid.long(),
    )
    found: Tensor = out.logits[reply.valid]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_whatever_is_padded(kind: str, side: str) -> None:
    model, theirs = ours(kind), published(kind)
    for given in (text(side), text(lengths=(READ, READ), padded=False)):
        wanted = expected(theirs, given)
        assert float(wanted.detach().std()) > 0.15
        assert gap(logits(model, given), wanted) < 1e-4


@pytest.mark.parametrize("kind", ["1.0", "flan"])
def test_loss_and_gradients(kind: str) -> None:
    model, theirs, given = ours(kind), published(kind), text(padded=False)
    hidden, target = supervised(model.write(None, given).hidden, given.written.labels)
    loss = language(model.logits(hidden), target)
    labels = torch.cat([given.written.ids[:, 1:], torch.full((3, 1), IGNORE)], 1)
    wanted = theirs(input_ids=given.ids, attention_mask=given.valid.long(), labels=labels).loss
    assert gap(loss, wanted) < 1e-5
    theirs.zero_grad()
    loss.backward()
    wanted.backward()
    assert isinstance(model.language, EncoderDecoder)
    names = {unit.ours[0]: unit.theirs[0] for unit in part_of(kind).table.writing(model.language.state_dict())}
    for mine, other in names.items():
        found, grad = model.language.get_parameter(mine).grad, theirs.get_parameter(other).grad
        assert found is not None and grad is not None and float(grad.abs().max()) > 1e-4, mine
        assert gap(found, grad) < 1e-4, mine


@torch.no_grad()
def written(model: VisionLanguageModel, given: Text, decoding: Decoding, eos: int) -> list[list[int]]:
    out, said = model.write(None, given), given.written
    first = model.logits(last_valid(out.hidden, said.valid))
    return generate(model.proceed, first, out.state, said.ids, eos, decoding)


def asked(side: str, lengths: tuple[int, ...] = (READ, 5, 17)) -> Text:
    """Prompts without an answer: the reply is the start token alone."""
    given, start = text(side, lengths), torch.zeros(len(lengths), 1, dtype=torch.long)
    return Text(given.ids, given.valid, given.labels, given.full, Text(start, start == 0, start + IGNORE, True))


WAYS = {"greedy": Sampling(8), "penalty": Sampling(8, repetition_penalty=1.7), "beam": Beams(3, 8, length_penalty=-1.0)}


def answers(theirs: T5ForConditionalGeneration, given: Text, decoding: Decoding, eos: int) -> list[list[int]]:
    found = theirs.generate(
        input_ids=given.ids,
        attention_mask=given.valid.long(),
        do_sample=False,
        max_new_tokens=8,
        num_beams=getattr(decoding, "width", 1),
        length_penalty=-1.0,
        repetition_penalty=getattr(decoding, "repetition_penalty", 1.0),
        eos_token_id=eos,
    )[:, 1:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["1.0", "flan"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_answers_batched_and_alone(kind: str, side: str, way: str) -> None:
    model, theirs, given = ours(kind), published(kind), asked(side)
    free = written(model, given, WAYS[way], eos=1)
    assert len({tuple(row) for row in free}) == 3
    eos = free[0][1]
    found = written(model, given, WAYS[way], eos)
    assert found != free and min(map(len, found)) < 8
    assert found == answers(theirs, given, WAYS[way], eos)
    for row in range(3):
        kept = given.valid[row]
        one = given.ids[row][kept][None]
        alone = Text(one, torch.ones_like(one, dtype=torch.bool), one, True, given.written.select(torch.tensor([row])))
        assert written(model, alone, WAYS[way], eos) == [found[row]]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str) -> None:
    part, (config, tensors) = part_of(kind), files(kind)
    load_strict(part.module, part.table.to_ours(tensors), "model.safetensors")
    back = part.table.to_theirs(part.module.state_dict())
    assert set(back) == set(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in back.items())
    again = T5ForConditionalGeneration(T5Config(**config)).eval()
    if kind != "1.0":
        again.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
    missing, unexpected = again.load_state_dict(back, strict=False)
    assert not unexpected and {name.partition(".")[0] for name in missing} <= {"encoder", "decoder", "lm_head"}
    assert gap(expected(again, text()), expected(published(kind), text())) < 1e-5


CHANGES: dict[str, Callable[[EncoderDecoder], None]] = {
    "scores scaled": lambda model: setattr(model.decoder.blocks[1].mixer, "scale", None),
    "cross scores scaled": lambda model: setattr(model.decoder.blocks[1].cross.attention, "scale", None),
    "buckets of the other stack": lambda model: setattr(
        model.decoder.relative, "bucket", model.encoder.relative.bucket
    ),
    "nearer last bucket": lambda model: setattr(model.encoder.relative, "longest", 20),
    "exact GELU": lambda model: setattr(model.encoder.blocks[0].ffn, "activation", nn.GELU()),
    "states scaled": lambda model: setattr(model, "scale", WIDTH**-0.5),
    "another epsilon": lambda model: setattr(model.encoder.blocks[0].mixer_residual.norm, "eps", 1e-6),
    "no positions": lambda model: setattr(model.encoder, "relative", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_fact_is_noticed(change: str) -> None:
    model, given = ours("flan"), text()
    assert isinstance(model.language, EncoderDecoder)
    CHANGES[change](model.language)
    assert gap(logits(model, given), expected(published("flan"), given)) > 3e-4


def test_padding_seen_by_the_answer_is_noticed() -> None:
    model, given = ours("flan"), text()
    blind = Text(given.ids, torch.ones_like(given.valid), given.labels, True, given.reply)
    assert gap(logits(model, blind), expected(published("flan"), given)) > 1e-3


def test_other_settings_are_noticed() -> None:
    for changes in ({"dense_act_fn": "gelu"}, {"relative_attention_max_distance": 20}, {"layer_norm_epsilon": 1e-6}):
        assert gap(logits(ours("flan", **changes), text()), expected(published("flan"), text())) > 3e-4


def test_the_head_of_published_settings_is_their_own_or_tied() -> None:
    """Files of transformers 4 say it by `tie_word_embeddings`, those of 5 by `scale_decoder_outputs`."""
    config, _ = files("flan")
    assert config["tie_word_embeddings"] is True and config["scale_decoder_outputs"] is False
    old = {name: value for name, value in config.items() if name != "scale_decoder_outputs"}
    for given in (config, {**old, "tie_word_embeddings": False}):
        module = language_part(given, "config.json").module
        assert isinstance(module, EncoderDecoder) and module.head is not None and module.scale == 1.0
    module = language_part(old, "config.json").module
    assert isinstance(module, EncoderDecoder) and module.head is None and module.scale == WIDTH**-0.5


def test_copies_in_older_files_are_read_once() -> None:
    part, (_, tensors) = part_of("1.0"), files("1.0")
    shared = tensors["shared.weight"]
    copies = [f"{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")]
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    old = {**tensors, **dict.fromkeys(copies, shared), unread: torch.ones(8, 3)}
    found, wanted = part.table.to_ours(old), part.table.to_ours(tensors)
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match=r"t5: published tensors that our table does not know: decoder\.extra"):
        part.table.to_ours({**tensors, "decoder.extra": shared})


@pytest.mark.parametrize("feed", ["gated-tanh", "mixed-gelu", "swish"])
def test_unknown_activations_are_refused(feed: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: feed_forward_proj='{feed}' .* \(known: relu, gelu, gelu_new"):
        language_part({"model_type": "t5", "feed_forward_proj": feed}, "config.json")


def test_the_image_is_read_with_the_prompt() -> None:
    """Against theirs on the same embeddings, the image's among them, rows of different length."""
    decoder = ours("flan").language
    model = VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, 4), language=decoder)
    given = text("left", (12, 7))
    for row, place in enumerate((3, 6)):
        given.ids[row, place : place + 4] = IMAGE_ID
    seen = model.see(pictures())
    assert decoder is not None
    embedded = splice(decoder.embed(given.ids), given.ids, seen.soft, IMAGE_ID)
    reply = given.written
    out = published("flan")(
        inputs_embeds=embedded,
        attention_mask=given.valid.long(),
        decoder_input_ids=reply.ids,
        decoder_attention_mask=reply.valid.long(),
    )
    found = model.logits(model.write(seen, given).hidden)
    assert gap(found[reply.valid], out.logits[reply.valid]) < 1e-4
    other = model.logits(model.write(model.see(pictures() + 1), given).hidden)
    assert gap(found[reply.valid], other[reply.valid]) > 1e-3
