"""The contrastive loss over all passes of a step: the gradient of one big batch, whatever it is cut into."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import LANGUAGE, Made, tiny_run
from vlm.config.load import ConfigError
from vlm.data.batch import Batch
from vlm.data.marks import join, marks, unpack
from vlm.train.loop import one_step
from vlm.train.pool import pooled
from vlm.train.task import Itc, Views

CAPTIONS = ("a red square", "a green square", "a blue square on white", "yellow", "a red square", "black")


def made(folder: Path, kind: str, *overrides: str) -> Made:
    torch.manual_seed(0)
    return Made(tiny_run(folder, kind, "train.accumulate=3", *overrides))


def cut(parts: Made) -> list[Batch]:
    """Three passes of two; "a red square" stands in the first and in the last."""
    torch.manual_seed(0)
    return [parts.batch(*CAPTIONS[i : i + 2]) for i in (0, 2, 4)]


def whole(parts: Made) -> Batch:
    """The same in one: picture i of a pass is the picture of its number there."""
    group = cut(parts)
    one = parts.batch(*CAPTIONS)
    images = torch.cat([batch.images for batch in group])
    return Batch(**vars(one) | {"images": images, "positive": marks(group).fit(marks(group))})


def gradients(parts: Made, group: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The losses of a step without a step, and all gradients."""
    learning = [parameter for parameter in parts.task.parameters() if parameter.requires_grad]
    losses, _ = one_step(parts.passes, group, range(len(group)), torch.optim.SGD(learning, lr=0.0), None)
    return losses, {name: p.grad.clone() for name, p in parts.task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("clip", ["losses.0.label_smoothing=0.1", "losses.0.weight=2"]),
        ("qformer", ["losses=[{kind: itc, over: step}, {kind: lm}]"]),
    ],
)
def test_the_gradient_of_one_big_batch(tmp_path: Path, kind: str, overrides: list[str]) -> None:
    parts = made(tmp_path, kind, "losses.0.over=step", *overrides)
    for parameter in parts.model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    apart = gradients(parts, cut(parts))
    parts.task.objectives[0].passes = 1  # type: ignore[attr-defined]
    losses, expected = gradients(parts, [whole(parts)])
    assert apart[0] == pytest.approx(losses, abs=1e-6)
    assert apart[1].keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((apart[1][name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    # What no pooling gives is something else.
    alone, other = gradients(parts, cut(parts))
    assert alone["itc"] < losses["itc"] - 0.1
    assert max(float((other[name] - g).abs().max()) for name, g in expected.items()) > 1e-3


def test_both_passes_draw_the_same_dropout(tmp_path: Path) -> None:
    options = ["losses=[{kind: lm}, {kind: itm}, {kind: itc, over: step}]", "model.connector.dropout=0.5"]
    parts = made(tmp_path, "qformer", *options)
    parts.task.train()
    group = cut(parts)
    seeds = [7, 8, 9]
    found = pooled(parts.passes, group, seeds)
    assert found is not None
    vectors = []
    for batch, seed in zip(group, seeds, strict=True):
        torch.manual_seed(seed)
        views = Views(parts.model, batch)
        vectors.append((views.image, views.text))
    image, text = (torch.cat(part) for part in zip(*vectors, strict=True))
    loss = Itc(passes=3).loss(parts.model.contrast(image, text), marks(group).fit(marks(group)))
    assert found.loss() == pytest.approx(float(loss.detach()), abs=1e-6)
    leaves = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    parts.task.zero_grad()
    for batch, seed, pull in zip(group, seeds, found.pulls, strict=True):
        torch.manual_seed(seed)
        parts.task(batch, {"itc": 0.0, "itm": 0.0, "lm": 0.0}, pull).total.backward()
    for (name, parameter), gradient in zip(leaves.items(), expected, strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(own, gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_texts_of_one_pass_fit_images_of_another(tmp_path: Path) -> None:
    group = cut(made(tmp_path, "clip", "losses.0.over=step"))
    found = marks(group).fit(marks(group))
    # Ids count from 0 in each pass here, so the first pictures of all passes are the same thing, and so are the second.
    same = [[i % 2 == j % 2 or CAPTIONS[i] == CAPTIONS[j] for j in range(6)] for i in range(6)]
    assert found.tolist() == same


def test_marks_travel_as_numbers(tmp_path: Path) -> None:
    group = cut(made(tmp_path, "clip", "losses.0.over=step"))
    apart = [marks([batch]) for batch in group]
    assert [unpack(part.pack()) for part in apart] == apart
    assert join(apart) == marks(group)
    assert marks(group).fit(marks(group[1:2])).equal(marks(group).fit(marks(group))[:, 2:4])


def test_chance_counts_all_passes(tmp_path: Path) -> None:
    assert Itc(passes=3).chance(4, 4) == pytest.approx(math.log(12))
    parts = made(tmp_path, "clip", "losses.0.over=step")
    assert parts.task.objectives[0].passes == 3  # type: ignore[attr-defined]


def test_one_pass_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"over=step.*train\.accumulate=1"):
        tiny_run(tmp_path, "clip", "losses.0.over=step")


def test_without_it_nothing_is_pooled(tmp_path: Path) -> None:
    parts = made(tmp_path, "decoder", f"model.language.dim={LANGUAGE['dim']}")
    assert pooled(parts.passes, cut(parts), [0, 1, 2]) is None
