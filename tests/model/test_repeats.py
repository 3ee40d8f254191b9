"""Runs of tokens that never come twice: by hand, in what models write, and as transformers has it."""

from pathlib import Path

import pytest
import torch

from tests import folders
from tests.folders import photographs, written
from tests.model.small import llava, pictures, words
from tests.model.test_beam import found
from tests.model.test_generate import NEVER, continued, naive, prompts
from vlm.captions import captions
from vlm.model.beam import Beams
from vlm.model.generate import Decoding, Sampling, choose, generate, without_repeats
from vlm.ready import open_model


@pytest.mark.parametrize(
    ("size", "forbidden"),
    [(0, []), (1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (4, []), (9, [])],
)
def test_by_hand(size: int, forbidden: list[int]) -> None:
    past = torch.tensor([[-1, 1, 2, 1, 3, 2, 1]])  # after 2 1: 3; after 1: 2 and 3; the placeholder counts for nothing
    logits = without_repeats(torch.zeros(1, 5), past, size)
    assert logits.isneginf().nonzero()[:, 1].tolist() == forbidden


def repeats(row: list[int], size: int) -> int:
    runs = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
    return len(runs) - len(set(runs))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_of_tokens_comes_twice(size: int) -> None:
    model = llava()
    seen, text = model.see(pictures(4)), words(model, [1, 4, 2, 6], "left")
    before = [[token for token in prompt.tolist() if token >= 0] for prompt in prompts(text)]
    ways: list[Decoding] = [Sampling(20), Sampling(20, temperature=0.3), Beams(3, 20)]
    for way in ways:
        free = continued(model, seen, text, NEVER, way)
        assert any(repeats(row, size) for row in free), "nothing to forbid"
        new = continued(model, seen, text, NEVER, type(way)(**{**way.__dict__, "no_repeat_ngram": size}))
        assert [repeats(row, size) for row in new] == [0] * 4
        if size == 1:
            assert not any(set(row) & set(said) for row, said in zip(new, before, strict=True))
    assert continued(model, seen, text, NEVER, Sampling(8, no_repeat_ngram=30)) == [
        naive(model, seen.select(torch.tensor([i])), prompt, NEVER, 8) for i, prompt in enumerate(prompts(text))
    ]


def test_all_of_the_best_beams_obey() -> None:
    model = llava()
    seen, text = model.see(pictures(2)), words(model, [1, 4], "left")
    rows = found(model, seen, text, [NEVER], Beams(4, 16, returned=4, no_repeat_ngram=2))
    assert [len(row) for row in rows] == [4, 4] and not any(repeats(one.ids, 2) for row in rows for one in row)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("beams", [1, 3])
def test_as_transformers(size: int, beams: int, tmp_path: Path) -> None:
    made = folders.blip2(tmp_path / "published", "opt")
    ready = open_model(str(made.folder))
    assert ready.model.vision is not None
    seen = torch.stack([ready.model.vision.transform(picture) for picture in photographs()])
    how: Decoding = Sampling(14, no_repeat_ngram=size) if beams == 1 else Beams(beams, 14, no_repeat_ngram=size)
    options = {"num_beams": beams, "max_new_tokens": 14, "no_repeat_ngram_size": size}
    theirs = written(made, photographs(), "a photo of", do_sample=False, **options)
    assert [text.split() for text in captions(ready, seen, how)] == [text.split() for text in theirs]
    assert theirs != written(
        made, photographs(), "a photo of", do_sample=False, **(options | {"no_repeat_ngram_size": 0})
    )


def test_dice_of_each_row_follow_the_probabilities_and_no_other_row() -> None:
    logits = torch.tensor([0.15, 0.0, 0.5, 0.1, 0.25]).log().expand(3000, -1)

    def drawn(rows: int) -> list[int]:
        dice = [torch.Generator().manual_seed(seed) for seed in range(rows)]
        return choose(logits[:rows], None, Sampling(temperature=1.0), None, dice).tolist()

    shares = torch.bincount(torch.tensor(drawn(3000)), minlength=5) / 3000
    assert float((shares - torch.tensor([0.15, 0.0, 0.5, 0.1, 0.25])).abs().max()) < 0.03 and shares[1] == 0
    assert drawn(3000)[:7] == drawn(7)


def test_generate_takes_the_dice() -> None:
    model = llava()
    seen, text = model.see(pictures(3)), words(model, [2, 3, 1], "left")
    with torch.no_grad():
        out = model.write(seen, text)
    logits = model.logits(out.hidden[:, -1])
    said = torch.where(text.valid, text.ids, -1)

    def drawn(rows: list[int]) -> list[list[int]]:
        index = torch.tensor(rows)
        dice = [torch.Generator().manual_seed(row) for row in rows]
        start = logits[index], out.state.reorder(index), said[index]
        return generate(model.proceed, *start, NEVER, Sampling(6, temperature=2.0), dice)

    together = drawn([0, 1, 2])
    assert together == [row for i in range(3) for row in drawn([i])]
