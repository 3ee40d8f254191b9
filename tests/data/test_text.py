"""Tokenizers against open_clip and against hostile text; labels of captions and prompts by hand."""

import json
import pickle
import unicodedata
from pathlib import Path

import open_clip
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vlm.data.encode import encode_prompt
from vlm.data.text import (
    Tokenizer,
    clip_tokenizer,
    encode_caption,
    load_tokenizer,
    train_bpe,
)
from vlm.nn.tokens import IGNORE, IMAGE_ID

CAPTIONS = ["a red fox", "a blue bird on a branch", "the fox and the bird", "naïve café", "日本語", "🦊 fox"] * 3
CONTROL = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<dec>",
    "<start_of_text>",
    "<end_of_text>",
    "</s>",
    "<image>",
    "[SEP]",
    "<|endoftext|>",
]


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def reference() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CAPTIONS, 300)


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat",
        "It's the dog's   bone; we'll see, I'd say I'm here, they've",
        "in 2023: 10% better, 3.14159",
        "naïve café déjà vu, e\u0301te",
        "日本語のテスト Привет мир ١٢٣ ½ ²",
        "emoji 🏆️ 😀 👨‍👩‍👧",
        "ÅNGSTRÖM a_b__c <tag> !!!...???",
        "“quoted” ‘text’ don’t",
        "a&amp;b &lt;tag&gt; &quot;x&quot; &amp;lt;",
        "ﬁne ﬂow oﬃce",
        "  lead \t tail \r\n",
        "</w> hello'sworld A'S",
        "\x00ctrl\x07 \u200bzero\ufeff",
        "",
    ],
)
def test_clip_ids_and_text_equal_open_clip(clip: Tokenizer, reference: open_clip.SimpleTokenizer, text: str) -> None:
    assert clip.encode(text) == reference.encode(text)
    assert clip.decode(clip.encode(text)) == reference.decode(reference.encode(text)).strip()


@settings(max_examples=200, deadline=None)
@given(st.text("abc XYZ 0123 '!?.,-_\t\nßñç日本кир🏆s", max_size=30))
def test_clip_equals_open_clip_on_any_mix(clip: Tokenizer, reference: open_clip.SimpleTokenizer, text: str) -> None:
    assert clip.encode(text) == reference.encode(text)


def test_clip_control_ids_are_open_clips(clip: Tokenizer, reference: open_clip.SimpleTokenizer) -> None:
    assert (clip.bos, clip.eos, clip.size) == (reference.sot_token_id, reference.eot_token_id, reference.vocab_size)
    assert clip.dec == clip.bos and clip.pad == clip.eos


def test_clip_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install open_clip_torch"):
        clip_tokenizer()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=6)), max_size=5).map("".join))
def test_no_text_becomes_a_control_token(bpe: Tokenizer, clip: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, clip):
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.dec} & set(ids)
        assert all(0 <= i < tokenizer.size for i in ids)


def test_vocabularies_that_match_control_spellings() -> None:
    vocab = [
        ("<pad>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("a", -1.0),
        ("<", -3.0),
        ("/", -3.0),
        ("s", -3.0),
        (">", -3.0),
    ]
    inner = tokenizers.Tokenizer(models.Unigram(vocab, 3, False))
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>")])
    assert inner.encode("a</s>a").ids == [3, 2, 3]  # what would happen
    assert Tokenizer(inner, bos=1, eos=2, pad=0, dec=1).encode("a</s>a<s>") == [3, 3]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20))
def test_bpe_round_trip(bpe: Tokenizer, text: str) -> None:
    whole = unicodedata.normalize("NFC", text)
    assert bpe.decode(bpe.encode(text)) == (whole.removeprefix(" "))


def test_decode_skips_and_goes_on(bpe: Tokenizer) -> None:
    fox, bird = bpe.encode("a red fox"), bpe.encode("bird")
    ids = [bpe.bos, IMAGE_ID, *fox, bpe.eos, IGNORE, *bird, bpe.pad, bpe.dec]
    assert bpe.decode(ids) == "a red fox bird"


def test_bpe_is_a_function_of_its_captions() -> None:
    first, again = train_bpe(CAPTIONS, 280), train_bpe(iter(CAPTIONS[::-1]), 280)
    assert first.inner.to_str() == again.inner.to_str()
    assert (first.pad, first.bos, first.eos, first.dec) == (0, 1, 2, 3) and first.size <= 280
    with pytest.raises(ValueError, match="vocab=100: a byte-level vocabulary needs at least 260"):
        train_bpe(CAPTIONS, 100)


@pytest.mark.parametrize("name", ["bpe", "clip"])
def test_saved_and_pickled_are_equal(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (other.bos, other.eos, other.pad, other.dec, other.size) == (
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.pad,
            tokenizer.dec,
            tokenizer.size,
        )
        text = "The <eos> fox's </s> 🦊 café"
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(other.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def _word_tokenizer(path: Path, *names: str) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"fox": 0, "?": 1}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(list(names))
    inner.save(str(path))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["[PAD]", "[CLS]", "[SEP]", "[DEC]"], (3, 4, 2, 5)),
        (["<s>", "</s>"], (2, 3, 3, 2)),
        (["<|endoftext|>", "<|im_start|>"], (2, 2, 2, 2)),
    ],
)
def test_usual_names_are_recognised(names: list[str], expected: tuple[int, ...], tmp_path: Path) -> None:
    _word_tokenizer(tmp_path / "tokenizer.json", *names)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.dec) == expected


def test_tokenizer_config_wins_over_names(tmp_path: Path) -> None:
    _word_tokenizer(tmp_path / "tokenizer.json", "<s>", "</s>", "<go>", "<stop>")
    config = {"bos_token": "<go>", "eos_token": {"content": "<stop>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (4, 5, 5)


def test_load_errors_name_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.json: No such file .*; give one of tokenizer.json, "):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json: not a readable tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    _word_tokenizer(tmp_path / "tokenizer.json", "<s>")
    with pytest.raises(ValueError, match=r'no eos token \(none of <eos>, .*"eos_token" beside it'):
        load_tokenizer(tmp_path)


def test_caption_by_hand(bpe: Tokenizer) -> None:
    words = bpe.encode("a red fox")
    whole = encode_caption(bpe, "a red fox", 32)
    assert whole.ids == [bpe.bos, *words, bpe.eos]
    assert whole.labels == [IGNORE, *words, bpe.eos]
    cut = encode_caption(bpe, "a red fox", 4)
    assert cut.ids == [bpe.bos, *words[:2], bpe.eos] and cut.labels == [IGNORE, *words[:2], bpe.eos]
    with pytest.raises(ValueError, match="max_tokens=2"):
        encode_caption(bpe, "a", 2)


def test_prompt_by_hand(bpe: Tokenizer) -> None:
    of, fox = bpe.encode("a bird of"), bpe.encode("fox")
    image = [IMAGE_ID] * 3
    encoded = encode_prompt(bpe, "{image} a bird of {text}", "fox", 3, 32)
    assert encoded.ids == [bpe.bos, *image, *of, *fox, bpe.eos]
    assert encoded.labels == [IGNORE] * (4 + len(of)) + [*fox, bpe.eos]
    assert encode_prompt(bpe, "{image}{text}", "fox", 3, 32).ids == [bpe.bos, *image, *fox, bpe.eos]
    assert encode_prompt(bpe, "fox{image}{text}", "fox", 3, 32).ids == [bpe.bos, *fox, *image, *fox, bpe.eos]
    assert encode_prompt(bpe, "{text}", "fox", 3, 32).ids == [bpe.bos, *fox, bpe.eos]


TEMPLATES = [
    "{image}{text}",
    "{image} a photo of {text}",
    "see {image}\n{text}",
    "{image}\nQuestion: what? Answer: {text}",
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEMPLATES), st.text(max_size=20), st.integers(0, 5), st.integers(60, 70))
def test_prompt_invariants(bpe: Tokenizer, clip: Tokenizer, template: str, text: str, images: int, limit: int) -> None:
    for tokenizer in (bpe, clip):
        start = encode_prompt(tokenizer, template, None, images, limit)
        whole = encode_prompt(tokenizer, template, text, images, limit)
        answer = whole.ids[len(start.ids) :]
        assert whole.ids[: len(start.ids)] == start.ids  # generation starts exactly as training did
        assert whole.labels == [IGNORE] * len(start.ids) + answer
        assert answer[-1] == tokenizer.eos and whole.labels.count(tokenizer.eos) == 1
        assert whole.ids.count(IMAGE_ID) == images and len(whole.ids) - images <= limit


def test_prompt_truncation_cuts_only_the_answer(bpe: Tokenizer) -> None:
    of, long = bpe.encode("a photo of"), "fox bird " * 50
    encoded = encode_prompt(bpe, "{image} a photo of {text}", long, 7, 1 + len(of) + 3)
    assert encoded.ids == [bpe.bos, *[IMAGE_ID] * 7, *of, *bpe.encode(long)[:2], bpe.eos]
    with pytest.raises(ValueError, match="no room for an answer; raise max_tokens"):
        encode_prompt(bpe, "{image} a photo of {text}", None, 7, 2 + len(of))


def test_space_before_the_answer_follows_the_tokenizer() -> None:
    inner = tokenizers.Tokenizer(models.BPE({"Ġ": 0, "a": 1, "b": 2, "<s>": 3, "</s>": 4}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as GPT-2
    tokenizer = Tokenizer(inner, bos=3, eos=4, pad=4, dec=3)
    assert encode_prompt(tokenizer, "{image}a {text}", None, 1, 9).ids == [3, IMAGE_ID, 1]
    assert encode_prompt(tokenizer, "{image}a {text}", "b", 1, 9).ids == [3, IMAGE_ID, 1, 0, 2, 4]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{image} only", "holds {text} 0 times"),
        ("{text}{image}{text}", "holds {text} 2 times"),
        ("{image}{image}{text}", "holds {image} 2 times"),
        ("{image}{txt}", "{txt} is unknown; use {image} and {text}"),
        ("{image}{text}.", "{text} must be its end"),
        ("{text}{image}", "{text} must be its end"),
    ],
)
def test_template_errors(bpe: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode_prompt(bpe, template, "fox", 1, 32)
    assert repr(template) in str(caught.value) and message in str(caught.value)
