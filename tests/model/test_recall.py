"""A connector set in closed form says the words of the right class for pictures that it was not set with."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vlm.model.connector import PrefixConnector
from vlm.model.recall import recall

CLASSES, TOKENS, WIDTH, QUERIES, DIM = 12, 4, 32, 3, 24


def pictures(seed: int, each: int) -> tuple[Tensor, Tensor]:
    """Classes are points, pictures are near them."""
    points = torch.randn(CLASSES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(CLASSES).repeat(each)
    noise = torch.randn(len(classes), TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return points[classes] + noise, classes


def words() -> Tensor:
    return torch.randn(CLASSES, QUERIES, DIM, generator=torch.Generator().manual_seed(9)) * 0.1 + 0.05


def named(soft: Tensor, values: Tensor) -> Tensor:
    middle = values.mean((0, 1))
    return functional.cosine_similarity(soft[:, None] - middle, (values - middle)[None], dim=-1).mean(2).argmax(1)


def connector(hidden: int = CLASSES, depth: int = 2) -> PrefixConnector:
    torch.manual_seed(3)
    return PrefixConnector(WIDTH, DIM, TOKENS, QUERIES, depth, hidden)


@torch.no_grad()
def test_new_pictures_say_the_words_of_their_class() -> None:
    ours, (image, classes), values = connector(), pictures(1, 3), words()
    left_out = recall(ours, image, classes, values)
    new, wanted = pictures(2, 5)
    soft = ours(new)
    assert soft.shape == (len(new), QUERIES, DIM)
    assert (named(soft, values) == wanted).float().mean() > 0.9 and left_out > 90
    middle = values.mean((0, 1))
    length = (values - middle).pow(2).mean().sqrt()
    assert torch.allclose((soft - middle).pow(2).mean(-1).sqrt(), length.expand(len(new), QUERIES), rtol=0.1)


@torch.no_grad()
def test_it_was_not_so_before() -> None:
    new, wanted = pictures(2, 5)
    assert (named(connector()(new), words()) == wanted).float().mean() < 0.4


def test_the_share_of_left_out_pictures_is_what_leaving_each_out_gives() -> None:
    ours, (image, classes), values = connector(), pictures(1, 3), words()
    share = recall(ours, image, classes, values, ridge=0.5)
    hits = 0
    for i in range(len(image)):
        kept = torch.arange(len(image)) != i
        vectors, target = ours.vector(image).detach(), functional.one_hot(classes, CLASSES).float()
        alike = vectors[kept] @ vectors[kept].T / vectors.shape[1] + 0.5 * torch.eye(len(image) - 1)
        score = vectors[i] @ vectors[kept].T / vectors.shape[1] @ torch.linalg.solve(alike, target[kept])
        hits += int(score.argmax() == classes[i])
    assert share == pytest.approx(100 * hits / len(image))


def test_what_cannot_be_set_is_refused() -> None:
    image, classes = pictures(1, 3)
    for wrong in (connector(hidden=5), connector(depth=1), connector(depth=3)):
        with pytest.raises(ValueError, match="depth 2 and hidden=12"):
            recall(wrong, image, classes, words())
    single, one = pictures(1, 1)
    with pytest.raises(ValueError, match="two of each"):
        recall(connector(), single, one, words())
