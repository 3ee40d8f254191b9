"""A model's captions do not depend on batches, memory, or what else is captioned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import COLOURS, picture
from vlm.captioning import speak
from vlm.captioning.speak import Speaker, chosen_device, decoding, set_precision
from vlm.captioning.wishes import Words
from vlm.captions import captions
from vlm.data.image import decode
from vlm.model.beam import Beams
from vlm.model.describe import Caption
from vlm.model.generate import Decoding, Sampling
from vlm.model.published.usage import BLIP2_OPT, LLAVA
from vlm.restore import Ready, restore

WAYS = [
    Words(),
    Words(max_new=6, min_new=3, repetition_penalty=1.3),
    Words(beams=3, captions=2, length_penalty=0.5),
    Words(temperature=3.0, top_k=50, captions=2),
    Words(prompt="a", no_repeat_ngram=1),
]


def pixels(speaker: Speaker) -> list[Tensor]:
    return [speaker.transform.read(picture(colour)) for colour in COLOURS]


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
@pytest.mark.parametrize("words", WAYS)
def test_batches_change_nothing(runs: Path, kind: str, words: Words) -> None:
    speaker = Speaker(restore(runs / kind), words)
    seen, names = pixels(speaker), list(COLOURS)
    together = speaker(names, seen)
    for size in (1, 3):
        parts = [speaker(names[i : i + size], seen[i : i + size]) for i in range(0, len(names), size)]
        told = [[(one.text, one.finish) for one in row] for part in parts for row in part]
        assert told == [[(one.text, one.finish) for one in row] for row in together]
    assert all(len(row) == words.captions for row in together) and len({row[0].text for row in together}) > 1
    assert all(caption.text.startswith(words.prompt) for row in together for caption in row)


def test_what_is_drawn_depends_on_seed_and_name(runs: Path) -> None:
    def drawn(seed: int, name: str) -> list[str]:
        speaker = Speaker(restore(runs / "decoder"), Words(temperature=3.0, captions=3, seed=seed))
        return [one.text for one in speaker([name], pixels(speaker)[:1])[0]]

    assert drawn(1, "a") == drawn(1, "a") and len(set(drawn(1, "a"))) > 1
    assert drawn(1, "a") != drawn(2, "a") and drawn(1, "a") != drawn(1, "b")


def test_a_batch_that_does_not_fit_is_divided(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = Speaker(restore(runs / "decoder"), Words(), 8)
    seen, sizes, original = pixels(speaker), list[int](), Speaker._say
    whole = speaker(COLOURS, seen)
    errors = iter([torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])

    def scarce(self: Speaker, names: Any, given: Any) -> list[list[Caption]]:
        sizes.append(len(names))
        if len(names) > 2:
            raise next(errors)
        return original(self, names, given)

    monkeypatch.setattr(Speaker, "_say", scarce)
    assert speaker(COLOURS[:5], seen[:5]) == whole[:5]
    assert (sizes, speaker.size) == ([5, 3, 2, 1, 2], 2)


def test_not_even_one_fits_and_other_errors(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = Speaker(restore(runs / "decoder"), Words())

    def fails(error: Exception) -> Any:
        def say(*_: object) -> None:
            raise error

        return say

    monkeypatch.setattr(Speaker, "_say", fails(MemoryError("full")))
    with pytest.raises(OSError, match=r"not enough memory for a single picture \(full\): take fewer --beams"):
        speaker(["a"], pixels(speaker)[:1])
    monkeypatch.setattr(Speaker, "_say", fails(RuntimeError("our own mistake")))
    with pytest.raises(RuntimeError, match="our own mistake"):
        speaker(["a", "b"], pixels(speaker)[:2])


def test_less_memory_smaller_batches(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = restore(runs / "decoder")
    sizes = []
    for free in (2**40, 2**20, 0):
        monkeypatch.setattr(speak, "free_memory", lambda _, free=free: free)
        sizes.append(Speaker(ready, Words()).size)
        assert Speaker(ready, Words(beams=8)).size <= sizes[-1]
    assert sizes[0] == speak.MOST > sizes[1] > sizes[2] == 1
    monkeypatch.undo()
    assert 2**24 < speak.free_memory(torch.device("cpu")) < 2**50


def of(ready: Ready, usage: Any) -> Ready:
    return replace(ready, usage=usage)


def test_ways_of_writing(runs: Path) -> None:
    plain = restore(runs / "decoder")
    assert decoding(plain, Words()) == Sampling(12)
    assert decoding(plain, Words(beams=4, captions=2, max_new=7)) == Beams(4, 7, returned=2)
    published = of(plain, BLIP2_OPT)
    expected: Decoding = replace(BLIP2_OPT.captions, returned=3, no_repeat_ngram=2)  # type: ignore[arg-type]
    assert decoding(published, Words(captions=3, no_repeat_ngram=2)) == expected
    assert decoding(published, Words(max_new=9)) == Sampling(9)  # anything said takes the place of all of it


@pytest.mark.parametrize(
    ("usage", "words", "message"),
    [
        (None, Words(captions=3), "--num-captions 3: there is one likeliest caption; draw"),
        (LLAVA, Words(captions=2), "--num-captions 2: there is one likeliest caption"),
        (BLIP2_OPT, Words(captions=6), "--num-captions 6: .* writes with 5 beams; raise --beams"),
        (None, Words(min_new=13), "--min-new 13: .* writes at most 12 tokens; raise --max-new"),
        (None, Words(ask="what?"), "--ask: .* was trained on captions"),
    ],
)
def test_what_a_model_cannot_do(runs: Path, usage: Any, words: Words, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speaker(of(restore(runs / "decoder"), usage), words)


@pytest.mark.parametrize("name", ["nothing", "cuda:99"])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name}: "):
        chosen_device(name)
    assert chosen_device("cpu").type == "cpu"


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
def test_precision(runs: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = restore(runs / kind)
    exact = [row[0].text for row in Speaker(ready, Words())(COLOURS, pixels(Speaker(ready, Words())))]
    ready = restore(runs / kind)  # what was laid out for one type stays of it
    set_precision(ready.model, "auto")
    assert {parameter.dtype for parameter in ready.model.parameters()} == {torch.float32}  # small: nothing to gain
    monkeypatch.setattr(speak, "LARGE", 1)
    monkeypatch.setattr(speak, "bfloat16_is_fast", lambda _: True)
    set_precision(ready.model, "auto")
    assert {parameter.dtype for parameter in ready.model.parameters()} == {torch.bfloat16}
    rounded = Speaker(ready, Words())
    found = [row[0].text for row in rounded(COLOURS, pixels(rounded))]
    assert sum(a == b for a, b in zip(exact, found, strict=True)) >= 6


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
def test_captions_of_images(runs: Path, kind: str) -> None:
    ready = restore(runs / kind)
    assert ready.model.vision is not None
    images = torch.stack([ready.model.vision.transform(decode(picture(colour))) for colour in COLOURS])
    found = captions(ready, images, Sampling(11))
    assert sum(text == f"a {colour} square" for text, colour in zip(found, COLOURS, strict=True)) >= 6
