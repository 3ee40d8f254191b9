"""An encoder-decoder trains like any language model: on its answers, and on nothing that it read."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.model.small import PATCHES, WIDTH, Eye
from tests.tiny import squares
from vlm.data.batch import Batch, collate
from vlm.data.image import decode
from vlm.data.shards import Sample, Shards
from vlm.data.text import Tokenizer, train_bpe
from vlm.eval.preview import as_text
from vlm.model.connector import MlpConnector
from vlm.model.seq2seq import t5
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.ffn import GatedMlp
from vlm.nn.tokens import IGNORE
from vlm.train.task import Lm, Task

TEMPLATE = "{image} a photo of {text}"
CAPTIONS = ("a red square", "a green square on white", "a blue square", "yellow")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(CAPTIONS * 3, 280)


def task(tokenizer: Tokenizer) -> Task:
    language = t5(tokenizer.size, WIDTH, 2, 3, head_dim=8, ffn=lambda: GatedMlp(WIDTH, 32, nn.GELU("tanh")), tied=False)
    model = VisionLanguageModel(Eye(), MlpConnector(10, WIDTH, PATCHES), language=language)
    return Task(model, [Lm(tokenizer.size, tokenizer.dec)])


def batch(tokenizer: Tokenizer, folder: Path, start: int) -> Batch:
    shards, eye = Shards(str(squares(folder / "s.tar", 4))), Eye()
    samples = [
        Sample(str(i), str(i), eye.transform.pixels(decode(shards.raw(i).image)), [caption])
        for i, caption in enumerate(CAPTIONS)
    ]
    made = collate(samples, tokenizer, 32, TEMPLATE, PATCHES, start)
    return replace(made, images=eye.transform.normalize(made.pixels))


def test_three_steps_lower_the_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = task(tokenizer)
    given = batch(tokenizer, tmp_path, made.model.reply_start or 0)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        total = made(given).total
        losses.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_only_answers_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = task(tokenizer)
    given = batch(tokenizer, tmp_path, 0)
    words = sum(len(tokenizer.encode(caption)) + 1 for caption in CAPTIONS)
    assert made.objectives[0].share(given) == words
    assert given.prompts is not None and (given.prompts.labels == IGNORE).all()
    shown = as_text(given, tokenizer).splitlines()
    answer = [tokenizer.inner.id_to_token(i) for i in tokenizer.encode(CAPTIONS[0])] + ["<eos>"]
    assert [line.split()[0].replace("␣", "Ġ") for line in shown if line.endswith("yes")] == answer
    assert shown[2].split()[0] == "<bos>" and "<image> x 4" in shown[3]


def test_micro_batches_add_up_to_the_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Answers of different length in different parts: each token counts the same."""
    made = task(tokenizer)
    given = batch(tokenizer, tmp_path, 0)
    whole = made(given).total
    total = torch.zeros(())
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        assert given.prompts is not None
        part = replace(
            given,
            images=given.pixels[rows],
            owner=torch.arange(2),
            captions=given.captions.select(rows),
            prompts=given.prompts.select(rows),
            positive=given.positive[rows][:, rows],
        )
        share = made.objectives[0].share(part) / made.objectives[0].share(given)
        total = total + made(part, {"lm": share}).total
    torch.testing.assert_close(total, whole)
