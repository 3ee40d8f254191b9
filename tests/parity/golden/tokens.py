"""Writes tokens.json and two small SentencePiece models: what SentencePiece itself and transformers make of many texts.

    python -m venv oracle && . oracle/bin/activate
    pip install sentencepiece==0.2.3 protobuf==7.36.2 transformers==5.24.0
    python tests/parity/golden/tokens.py

One model is like Llama's and Vicuna's (BPE, bytes for what is unknown, digits alone, spaces kept), one like T5's
(unigram, a table of normalisations, spaces tidied). Our reader needs neither library, so neither is needed to test it.
"""

import contextlib
import io
import json
import random
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
WORDS = [
    "fox",
    "the ",
    " ",
    "  ",
    "\n",
    "\t",
    "🦊",
    "日本",
    "語",
    "é",
    "ﬁ",
    "Ａ",
    "①",
    "\u00a0",
    "▁",
    "1234",
    "café",
    "Привет",
    "ß",
    "👨\u200d👩\u200d👧",
    "#",
    "vlm train",
    "licence",
    ".",
    " a",
    "e\u0301",
    "<0x0A>",
    "\r\n",
    "\x00",
    "It's",
]
CONTROL = ["<s>", "</s>", "<unk>", "< s>"]
RULES = (
    "FB01\t66 69\nFF21\t41\nA0\t20\n2460\t31\nE9\t65 301\n"  # ligature, full width, hard space, circled digit, accent
)


def trained(**options: object) -> bytes:
    """A model of the words of this repository's README and licence."""
    import sentencepiece

    lines = [*(ROOT / "README.md").read_text().splitlines(), *(ROOT / "LICENSE").read_text().splitlines()]
    lines += ["naïve café déjà vu", "日本語のテスト", "Привет мир", "🦊 fox   jumps", "1234567890 3.14"] * 3
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=made, minloglevel=2, **options)
    return made.getvalue()


def texts(words: list[str]) -> list[str]:
    """Fixed mixtures of words, and the smallest texts."""
    draw = random.Random(0)
    mixed = ["".join(draw.choice(words) for _ in range(draw.randint(1, 8))) for _ in range(400)]
    return ["", "a", " ", " a", "a ", "  a  b  ", "a photo of a red fox.", *mixed]


def main() -> None:
    """All files of the test."""
    import sentencepiece
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the model keeps the name of the table
        Path("rules.tsv").write_text(RULES)
        models = {
            "llama": trained(
                model_type="bpe",
                vocab_size=600,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                character_coverage=0.99,
            ),
            "t5": trained(
                model_type="unigram",
                vocab_size=400,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                normalization_rule_tsv="rules.tsv",
                character_coverage=0.98,
            ),
        }
    found = {}
    for name, model in models.items():
        (FOLDER / f"tokens_{name}.model").write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        given = texts(WORDS + CONTROL if name == "llama" else WORDS)
        rows = [(text, processor.encode(text)) for text in given]
        found[name] = [(text, ids, processor.decode(ids)) for text, ids in rows]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(models["llama"])
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
        theirs = LlamaTokenizer.from_pretrained(folder)
        # It reads control tokens in a text, and leaves out SentencePiece's space before a text that begins with one.
        plain = [text for text, _, _ in found["llama"] if not any(word in text for word in CONTROL)]
        plain = [text for text in plain if not text.startswith((" ", "▁"))]
        found["transformers' llama"] = [(text, theirs(text)["input_ids"], "") for text in plain]
    file = FOLDER / "tokens.json"
    file.write_text(json.dumps(found, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
