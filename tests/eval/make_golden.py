"""Writes golden_captions.json: what COCO's code gives for texts of our own, once, with a Java runtime.

    python -m venv oracle && . oracle/bin/activate
    pip install numpy && pip install --no-deps pycocoevalcap==1.2
    python tests/eval/make_golden.py

The tests need only this file's output. pycocoevalcap 1.2 brings the PTB tokenizer of Stanford CoreNLP 3.4.1 and METEOR
1.5. Rouge splits at single spaces and the others at any: the tokens are kept with one space between them.
"""

import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

HERE = Path(__file__).parent
OUT = HERE / "golden_captions.json"
FILL = ["a", "man", "the", "dog", "is", "on", "standing", "with", "two", "red", "bus", "near", "at", "of"]
FILL += ["and", "in", "white", "The", "A", "It", "People", "Two"]
ENDS = ["", "", ".", ".", "!", "?", " .", '."', ".'", "..."]


def coco(texts: list[str]) -> list[str]:
    """The words of lines of one file."""
    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [" ".join(found[i][0].split()) for i in range(len(texts))]


def lines() -> list[str]:
    """The strings by hand, each before a line that decides nothing, then mixtures of their words."""
    by_hand = (HERE / "captions.txt").read_text(encoding="utf-8").splitlines()
    chooser = random.Random(0)
    words = [word for text in by_hand for word in text.split()]
    mixed = []
    for _ in range(1500):
        share = chooser.choice((0.1, 0.4, 0.9))
        length = chooser.randint(2, 12)
        text = " ".join(chooser.choice(words if chooser.random() < share else FILL) for _ in range(length))
        mixed.append(text + chooser.choice(ENDS))
    return [text for line in by_hand for text in (line, "on and on")] + mixed


def samples() -> list[tuple[str, list[str]]]:
    """Captions that resemble their references more or less, some of them odd."""
    older = json.loads((HERE / "golden_cider.json").read_text(encoding="utf-8"))["samples"]
    found = [(sample["candidate"], sample["references"]) for sample in older]
    chooser = random.Random(1)
    subjects = ["a small dog", "two men", "a red bus", "three old women", "the white cat", "a boy in a blue shirt"]
    places = [
        "on the beach",
        "in a busy street",
        "next to a table",
        "under a tree.",
        "near the water",
        "on a train's roof",
    ]
    actions = ["is running", "are sitting down", "stands", "is parked", "looks at a bird", "holds a cup of tea"]

    def sentence() -> str:
        parts = [chooser.choice(subjects), chooser.choice(actions), chooser.choice(places)]
        return " ".join(parts[: chooser.randint(1, 3)])

    for _ in range(60):
        references = [sentence() for _ in range(chooser.randint(1, 6))]
        candidate = chooser.choice((sentence(), references[0], f"{references[0]} {references[0]}", sentence()))
        found.append((candidate, references))
    return found


def scores(candidates: list[str], references: list[list[str]]) -> dict[str, object]:
    """Of tokenized texts: of all together, and of each."""
    given = {i: [text] for i, text in enumerate(candidates)}
    wanted = dict(enumerate(references))
    bleu, each_bleu = Bleu(4).compute_score(wanted, given, verbose=0)
    rouge, each_rouge = Rouge().compute_score(wanted, given)
    cider, each_cider = Cider().compute_score(wanted, given)
    meteor, each_meteor = Meteor().compute_score(wanted, given)
    each = {"bleu": each_bleu, "rouge_l": list(each_rouge), "cider_d": list(each_cider), "meteor": each_meteor}
    return {"bleu": bleu, "rouge_l": float(rouge), "cider_d": float(cider), "meteor": meteor, "each": each}


def main() -> None:
    """Tokenize, score, write."""
    texts = lines()
    pairs = samples()
    flat = coco([text for _, group in pairs for text in group])
    at = iter(flat)
    candidates, references = coco([text for text, _ in pairs]), [[next(at) for _ in group] for _, group in pairs]
    numbers = range(len(pairs))
    sets = [list(numbers), *([i] for i in range(8)), list(range(5)), list(range(20, 50)), list(numbers)[::3]]
    found = {
        "about": "Made once with pycocoevalcap 1.2: PTB tokenizer of Stanford CoreNLP 3.4.1 and COCO's punctuation "
        "list, Bleu, Rouge, Cider, METEOR 1.5; all texts are made up. `lines` were tokenized as one file.",
        "lines": [[text, words] for text, words in zip(texts, coco(texts), strict=True)],
        "samples": [
            {"candidate": text, "references": group, "words": words, "reference_words": others}
            for (text, group), words, others in zip(pairs, candidates, references, strict=True)
        ],
        "sets": [
            {"samples": chosen, **scores([candidates[i] for i in chosen], [references[i] for i in chosen])}
            for chosen in sets
        ],
    }
    OUT.write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
