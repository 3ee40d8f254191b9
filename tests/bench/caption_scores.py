"""BLEU, ROUGE-L and CIDEr-D of 5,000 tokenized captions with 5 references each, beside pycocoevalcap.

    pip install --no-deps pycocoevalcap==1.2
    python -m tests.bench.caption_scores

The same words go to both, without a tokenizer, so the peer needs no Java. The scores are compared before the times.
"""

import random
import sys

import numpy as np
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from tests.bench.side_by_side import alternate, table
from vlm.eval.bleu import bleu
from vlm.eval.cider import each_cider_d
from vlm.eval.grams import count
from vlm.eval.rouge import rouge_l

IMAGES, REFERENCES, VOCABULARY = 5_000, 5, 8_000


def texts() -> tuple[list[list[str]], list[list[list[str]]]]:
    """Words drawn as often as in captions (Zipf), 8 to 14 a text; a candidate shares half of them with a reference."""
    chooser = random.Random(0)
    words = [f"word{number}" for number in range(VOCABULARY)]
    weights = [1 / (number + 2) for number in range(VOCABULARY)]

    def text() -> list[str]:
        return chooser.choices(words, weights, k=chooser.randint(8, 14))

    references = [[text() for _ in range(REFERENCES)] for _ in range(IMAGES)]
    return [[*group[0][:6], *text()[:5]] for group in references], references


def main() -> None:
    """Compare, then measure."""
    torch.set_num_threads(1)
    candidates, references = texts()
    given = {number: [" ".join(words)] for number, words in enumerate(candidates)}
    wanted = {number: [" ".join(words) for words in group] for number, group in enumerate(references)}

    def ours() -> list[float]:
        counted = count(candidates, references)
        rouge = [rouge_l(*pair) for pair in zip(candidates, references, strict=True)]
        return [*bleu(counted).together.tolist(), float(np.mean(rouge)), float(each_cider_d(counted).mean())]

    def theirs() -> list[float]:
        found, _ = Bleu(4).compute_score(wanted, given, verbose=0)
        return [*found, float(Rouge().compute_score(wanted, given)[0]), float(Cider().compute_score(wanted, given)[0])]

    apart = np.abs(np.array(ours()) - theirs()).max()
    print(f"largest difference of the scores {apart:.1e}")
    assert apart < 1e-6
    only = {
        "BLEU": (lambda: bleu(count(candidates, references)), lambda: Bleu(4).compute_score(wanted, given, verbose=0)),
        "ROUGE-L": (
            lambda: [rouge_l(*pair) for pair in zip(candidates, references, strict=True)],
            lambda: Rouge().compute_score(wanted, given),
        ),
        "CIDEr-D": (
            lambda: each_cider_d(count(candidates, references)),
            lambda: Cider().compute_score(wanted, given),
        ),
    }
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    table("all three", alternate({"pycocoevalcap": theirs, "vlm": ours}, rounds), "pycocoevalcap")
    for name, (own, peer) in only.items():
        table(name, alternate({"pycocoevalcap": peer, "vlm": own}, rounds), "pycocoevalcap")


if __name__ == "__main__":
    main()
