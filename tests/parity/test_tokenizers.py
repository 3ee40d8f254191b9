"""Published tokenizers from their own files give the ids of SentencePiece and of transformers.

golden/tokens.py says how the SentencePiece models and their ids were made and why they are kept.
"""

import json
import pickle
import re
import shutil
import string
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from vlm.data import sentencepiece
from vlm.data.encode import encode_prompt
from vlm.data.text import Tokenizer, encode_caption, load_tokenizer, train_bpe
from vlm.nn.tokens import IGNORE

GOLDEN = Path(__file__).parent / "golden"
FOUND: dict[str, list[tuple[str, list[int], str]]] = json.loads((GOLDEN / "tokens.json").read_text())
LINES = [*(Path(__file__).parents[2] / "LICENSE").read_text().splitlines(), "naïve café", "日本語", "🦊 12345 it's"] * 2
TEXTS = st.text(max_size=25) | st.text("abc XYZ 0123 '!?.,-_\t\nßñç日本кир🏆s", max_size=40)


def folder_of(folder: Path, name: str, as_file: str, **files: Any) -> Path:
    """A published folder with one of the kept models, and JSON files beside it."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / f"tokens_{name}.model", folder / as_file)
    return with_files(folder, **files)


def with_files(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("name", "file"), [("llama", "tokenizer.model"), ("t5", "spiece.model")])
def test_ids_are_those_of_sentencepiece(name: str, file: str, tmp_path: Path) -> None:
    ours = load_tokenizer(folder_of(tmp_path, name, file))
    assert [ours.encode(text) for text, _, _ in FOUND[name]] == [ids for _, ids, _ in FOUND[name]]
    unknown = ours.inner.token_to_id("<unk>")
    known = [(ids, text) for _, ids, text in FOUND[name] if unknown not in ids]
    assert len(known) > 60
    assert [ours.decode(ids) for ids, _ in known] == [text for _, text in known]


def test_ids_are_those_of_transformers_llama(tmp_path: Path) -> None:
    ours = load_tokenizer(folder_of(tmp_path, "llama", "tokenizer.model"))
    rows = FOUND["transformers' llama"]
    assert [encode_caption(ours, text, 500).ids[:-1] for text, _, _ in rows] == [ids for _, ids, _ in rows]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"prefix": False}),
        ("llama", {"spells": False}),
        ("llama", {"tidy": True}),
        ("t5", {"charsmap": b""}),
        ("t5", {"tidy": False}),
    ],
)
def test_a_changed_fact_of_the_model_is_noticed(name: str, change: dict[str, Any]) -> None:
    model = sentencepiece._model((GOLDEN / f"tokens_{name}.model").read_bytes())
    other = sentencepiece._tokenizer(replace(model, **change))
    found = [other.encode(text, add_special_tokens=False).ids for text, _, _ in FOUND[name]]
    assert found != [ids for _, ids, _ in FOUND[name]]


WHOLE = (GOLDEN / "tokens_llama.model").read_bytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no pieces"),
        (b"no model at all", "wire type 6"),
        (b"\x0a\xff\xff\xff\xff\x7f", "cut short"),
        (b"\x0a" + b"\xff" * 12, "an integer of more than 64 bits"),
        (b"\x80", "index out of range"),
        (b"\x0a\x05\x0a\x03abc", "its parts do not belong together"),
        (WHOLE[:4001], "cut short"),
        (WHOLE + b"\x12\x02\x18\x03", "model_type=3, neither unigram nor BPE"),
        (WHOLE + b"\x0a\x05\x0a\x01a\x18\x04", "it has user_defined pieces; give the model's tokenizer.json"),
    ],
)
def test_a_damaged_or_strange_model_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    message = rf"tokenizer\.model: not a SentencePiece model that vlm can read \({re.escape(reason)}\)"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def byte_level(folder: Path, *control: str, regex: bool = True) -> None:
    """vocab.json and merges.txt of a byte-level BPE with control tokens in front."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [AddedToken(name, special=True) for name in control]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(LINES, trainer)
    inner.model.save(str(folder))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Tokenizer, Any]]]:
    """Ours and theirs from the same files."""
    make = partial(tmp_path_factory.mktemp, numbered=False)
    opt, gpt2, qwen, bert = make("opt"), make("gpt2"), make("qwen"), make("bert")
    byte_level(opt, "<s>", "<pad>", "</s>", "<unk>")
    end = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    with_files(opt, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **end})
    byte_level(gpt2, "<|endoftext|>")
    token = {"content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    roles = {f"{role}_token": token for role in ("bos", "eos", "unk")}
    with_files(gpt2, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, special_tokens_map=roles)
    byte_level(qwen)
    size = len(json.loads((qwen / "vocab.json").read_text()))
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = {str(size + i): {"content": name, "special": True} for i, name in enumerate(chat)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": chat[2], "pad_token": chat[0]}
    with_files(qwen, tokenizer_config={**config, "added_tokens_decoder": added, "add_bos_token": False})
    with_files(qwen, generation_config={"eos_token_id": [size + 2, size]})
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "##b",
        "fox",
        "##es",
        "cafe",
        "ca",
        "##fe",
        "日",
        "!",
        "1",
    ]
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    with_files(bert, tokenizer_config={"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    folders = {"opt": opt, "gpt2": gpt2, "qwen": qwen, "bert": bert}
    yield {name: (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen", "bert"])
@settings(max_examples=150)
@given(text=TEXTS)
def test_ids_and_text_are_those_of_transformers(
    published: dict[str, tuple[Tokenizer, Any]], name: str, text: str
) -> None:
    ours, theirs = published[name]
    text = text.encode("utf-8", "replace").decode()
    assume(not any(name in text for name in theirs.all_special_tokens))  # which theirs reads as such
    ids = ours.encode(text)
    end = [ours.eos] if name == "bert" else []
    assert [*ours.start, *ids, *end] == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_control_tokens_are_those_of_transformers(published: dict[str, tuple[Tokenizer, Any]]) -> None:
    for name, (ours, theirs) in published.items():
        pad = ours.eos if theirs.pad_token_id is None else theirs.pad_token_id
        assert ours.pad == pad
        assert ours.eos == (theirs.sep_token_id if name == "bert" else theirs.eos_token_id)
        assert ours.size == len(theirs)
    opt, qwen = published["opt"][0], published["qwen"][0]
    assert opt.bos == opt.eos == 2 and opt.ends == (2,)
    assert published["gpt2"][0].bos is None
    assert qwen.bos is None and qwen.dec == qwen.eos and qwen.ends == (qwen.eos, qwen.eos - 2)
    assert published["bert"][0].bos == 2


def test_a_text_without_a_start_token(published: dict[str, tuple[Tokenizer, Any]]) -> None:
    qwen = published["qwen"][0]
    ids = qwen.encode("a fox")
    assert encode_caption(qwen, "a fox", 20).ids == [*ids, qwen.eos]
    assert encode_caption(qwen, "a fox", 20).labels == [*ids, qwen.eos]
    assert encode_caption(qwen, "a fox", 2).ids == [ids[0], qwen.eos]
    with pytest.raises(ValueError, match=r"max_tokens=1: .* need at least 2"):
        encode_caption(qwen, "a", 1)
    prompt = encode_prompt(qwen, "{image}a {text}", "fox", 2, 20)
    before = len(prompt.ids) - len(qwen.encode(" fox")) - 1
    assert prompt.ids[:3] == [-1, -1, *qwen.encode("a")] and prompt.labels[:before] == [IGNORE] * before


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen", "bert"])
def test_saved_and_sent_are_equal(published: dict[str, tuple[Tokenizer, Any]], name: str, tmp_path: Path) -> None:
    ours = published[name][0]
    ours.save(tmp_path / "tokenizer.json")
    for other in (load_tokenizer(tmp_path), Tokenizer.from_text(ours.to_text()), pickle.loads(pickle.dumps(ours))):
        assert other.control == ours.control and other.size == ours.size
        assert other.encode("A fox's </s> 🦊 café\n") == ours.encode("A fox's </s> 🦊 café\n")


def test_sentinels_of_t5_and_its_end(tmp_path: Path) -> None:
    ours = load_tokenizer(folder_of(tmp_path, "t5", "spiece.model", tokenizer_config={"extra_ids": 10}))
    assert (ours.bos, ours.eos, ours.pad, ours.size) == (None, 1, 0, 410)
    assert ours.inner.token_to_id("<extra_id_0>") == 409 and ours.inner.token_to_id("<extra_id_9>") == 400


def test_tokens_added_to_vicuna_and_llava(tmp_path: Path) -> None:
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vicuna = folder_of(
        tmp_path / "vicuna",
        "llama",
        "tokenizer.model",
        added_tokens={"<pad>": 600, "foxes": 601},
        special_tokens_map=roles,
        tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        generation_config={"eos_token_id": 2},
    )
    ours = load_tokenizer(vicuna)
    assert (ours.bos, ours.eos, ours.pad, ours.size, ours.ends) == (1, 2, 600, 602, (2,))
    assert 601 in ours.encode("two foxes") and 600 not in ours.encode("two <pad>")
    image = {"content": "<image>", "special": True, "normalized": False}
    llava = folder_of(
        tmp_path / "llava",
        "llama",
        "tokenizer.model",
        tokenizer_config={"added_tokens_decoder": {"600": image}, "add_bos_token": False, **roles},
    )
    ours = load_tokenizer(llava)
    assert ours.bos is None and ours.inner.token_to_id("<image>") == 600
    with_files(llava, tokenizer_config={"added_tokens_decoder": {"700": image}})
    with pytest.raises(ValueError, match=r"'<image>' is to be token 700, but the vocabulary makes it 600"):
        load_tokenizer(llava)


def llama3(folder: Path, **files: Any) -> Path:
    """A tokenizer.json with Llama-3's template."""
    inner = train_bpe(["a fox", "a bird"], 300).inner
    inner = tokenizers.Tokenizer.from_str(inner.to_str())
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    inner.add_special_tokens(names)
    first = inner.token_to_id(names[0])
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single=[names[0], "$A"], special_tokens=[(names[0], first)]),
        ]
    )
    inner.save(str(folder / "tokenizer.json"))
    return with_files(folder, **files)


def test_several_ends_of_a_chat_model(tmp_path: Path) -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    first = load_tokenizer(llama3(tmp_path, tokenizer_config=config))
    assert first.inner.id_to_token(first.bos or 0) == "<|begin_of_text|>" and first.ends == (first.eos,)
    end = first.eos - 1
    both = load_tokenizer(llama3(tmp_path, generation_config={"eos_token_id": [end, first.eos]}))
    assert (both.eos, both.ends) == (first.eos, (first.eos, end))
    with_files(tmp_path, generation_config={}, config={"eos_token_id": end})
    assert load_tokenizer(tmp_path).ends == (end,) and load_tokenizer(tmp_path).eos == end
    with_files(tmp_path, config={"eos_token_id": 5000})
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id=5000: tokenizer\.json has no tokens \[5000\]"):
        load_tokenizer(tmp_path)


def test_a_line_break_that_ends_is_text_all_the_same(tmp_path: Path) -> None:
    byte_level(tmp_path, "<s>", "<pad>", "</s>", "<unk>")
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    line = json.loads((tmp_path / "vocab.json").read_text())["Ċ"]
    with_files(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": line})  # as BLIP-2 with OPT
    ours = load_tokenizer(tmp_path)
    assert (ours.bos, ours.eos, ours.ends) == (2, line, (line,))
    assert ours.encode("a\nb").count(line) == 1 and ours.decode([*ours.encode("a\nb"), 2]) == "a\nb"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {},
            r": no tokenizer in it \(none of tokenizer\.json, tokenizer\.model, .*, vocab\.txt\); ",
        ),
        ({"vocab": {"a": 0}}, r"vocab\.json: byte-level BPE of which family\?"),
        ({"vocab": {"a": 0}, "config": {"model_type": "roberta"}}, r"vocab\.json: byte-level BPE of which family\?"),
        ({"vocab": {"a": 0}, "config": {"model_type": "opt"}}, r"merges\.txt: No such file"),
    ],
)
def test_what_is_missing_is_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(with_files(tmp_path, **files))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with_files(tmp_path, vocab={"a": 0, "b": 1}, config={"model_type": "gpt2"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match=r"vocab\.json: does not fit the merges\.txt beside it"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: no word-piece vocabulary of BERT: it lacks \[CLS\], \[SEP\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: holds no table of settings"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("lower", [True, False])
def test_siglip_s_texts_lose_their_punctuation(lower: bool, tmp_path: Path) -> None:
    config = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": lower, "pad_token": "</s>"}
    ours = load_tokenizer(folder_of(tmp_path / "siglip", "t5", "spiece.model", tokenizer_config=config))
    plain = load_tokenizer(folder_of(tmp_path / "t5", "t5", "spiece.model"))
    without = str.maketrans("", "", string.punctuation)  # as big_vision and transformers' SiglipTokenizer have it
    for text in ["A red  square, (and) a Fox's tail!", "  What?\n50% \u2013 naïve_Café ", *LINES[:40]]:
        clean = (text.lower() if lower else text).translate(without)
        assert ours.encode(text) == plain.encode(re.sub(r"\s+", " ", clean).strip())
    assert plain.encode("A red, square") != ours.encode("A red, square")
    assert ours.pad == ours.eos
