"""Soft tokens that say words: by hand, and where the loss leads."""

import math

import pytest
import torch
from torch.nn import functional

from vlm.loss.words import chance, word_logits, word_loss

WORDS = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3


def test_by_hand() -> None:
    soft, target = (
        torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[0, 1, 2], [6, 6, 3]]),
    )
    middle = WORDS.mean(0)
    choice = 0.0
    for b in range(2):
        for q in range(3):
            cosines = torch.stack([functional.cosine_similarity(soft[b, q] - middle, w - middle, dim=0) for w in WORDS])
            choice -= float((cosines / 0.07).log_softmax(0)[target[b, q]]) / 6
    apart = float(((soft - WORDS[target]) ** 2).mean() / WORDS.var())
    assert float(word_loss(soft, WORDS, target, pull=0.5)) == pytest.approx(choice + 0.5 * apart, rel=1e-5)


def test_words_themselves_are_chosen_and_are_best() -> None:
    target = torch.tensor([[4, 2], [0, 6]])
    assert torch.equal(word_logits(WORDS[target], WORDS).argmax(-1), target)
    assert float(word_loss(WORDS[target], WORDS, target)) < 0.1
    soft = torch.zeros(2, 2, 16, requires_grad=True)
    optimizer = torch.optim.Adam([soft], 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        word_loss(soft, WORDS, target).backward()
        optimizer.step()
    assert torch.equal(word_logits(soft, WORDS).argmax(-1), target)


def test_chance_is_what_the_middle_gives() -> None:
    many = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
    middle = many.mean(0).expand(20, 25, 64)
    found = float(word_loss(middle, many, torch.arange(500).view(20, 25)))
    assert found == pytest.approx(chance(500), rel=0.01) and chance(500) == math.log(500) + 0.3
