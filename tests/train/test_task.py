"""Views are computed once for all objectives; what each objective counts by, and what guessing costs it."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import Made, pack, picture, tiny_run
from vlm.loss.language import language, supervised
from vlm.train.task import Itc, Itm, Lm, Objective, Views, written_by_qformer

CAPTIONS = ("a red square", "a green square", "a blue square on white", "yellow")


def calls(module: nn.Module) -> list[int]:
    """The batch size of every call from now on."""
    found: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: found.append(len(inputs[0])))
    return found


def test_every_objective_shares_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tiny_run(tmp_path, "qformer"))
    vision = calls(made.model.vision)
    qformer = made.model.connector
    counts = dict.fromkeys(("query", "read", "fuse", "write"), 0)
    for name in counts:

        def counted(*arguments: object, name: str = name, method: object = getattr(qformer, name)) -> object:
            counts[name] += 1
            return method(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(qformer, name, counted)
    looks: list[int] = []
    original = qformer.stack.look
    monkeypatch.setattr(qformer.stack, "look", lambda image: looks.append(len(image)) or original(image))
    losses = made.task(made.batch(*CAPTIONS))
    assert (vision, looks) == ([4], [4])
    assert counts == {"query": 1, "read": 1, "fuse": 1, "write": 1}
    assert set(losses.each) == {"itc", "itm", "lm"}


def test_views_are_lazy(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "clip"))
    vision, text = calls(made.model.vision), calls(made.model.text)
    views = Views(made.model, made.batch(*CAPTIONS))
    assert vision == text == []
    assert views.logits is views.logits
    assert views.seen is views.seen
    assert vision == text == [4]


def test_total_is_the_weighted_sum(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "qformer", "losses.0.weight=2", "losses.2.weight=0.5")
    made = Made(run)
    batch = made.batch(*CAPTIONS)
    torch.manual_seed(3)  # the same hard negatives
    losses = made.task(batch)
    expected = 2 * losses.each["itc"] + losses.each["itm"] + 0.5 * losses.each["lm"]
    torch.testing.assert_close(losses.total.detach(), expected)
    torch.manual_seed(3)
    half = made.task(batch, {"itc": 0.25, "itm": 0.0, "lm": 1.0})
    torch.testing.assert_close(half.total.detach(), 0.5 * losses.each["itc"] + 0.5 * losses.each["lm"])
    assert not losses.each["itc"].requires_grad


def test_shares(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "decoder"))
    batch = made.batch(*CAPTIONS)
    words = sum(
        min(len(made.tokenizer.encode(text)) + 1, 11) for text in CAPTIONS
    )  # with the end, of 12 less the start
    shares: dict[Objective, float] = {Itc(): 4, Itm(): 4, Lm(10, 3): words}
    assert {o: o.share(batch) for o in shares} == shares


def test_chance() -> None:
    assert Itc().chance(8, 8) == pytest.approx(math.log(8))
    assert Itc().chance(8, 16) == pytest.approx((math.log(8) + math.log(16)) / 2)
    assert Itm().chance(8, 8) == pytest.approx(0.6365, abs=1e-4)
    assert Lm(1500, 3).chance(8, 8) == pytest.approx(math.log(1500))


def test_a_model_that_knows_nothing_is_at_chance(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "qformer"))
    batch = made.batch(*CAPTIONS)
    for name, parameter in made.model.named_parameters():
        if name.startswith(("contrast.text", "match", "connector.text.head")):
            nn.init.zeros_(parameter)
        if name == "match.classify.bias":
            parameter.data.copy_(torch.tensor([2 / 3, 1 / 3]).log())  # two of three pairs are apart: all one can know
    losses = made.task(batch).each
    for objective in made.task.objectives:
        assert float(losses[objective.name]) == pytest.approx(objective.chance(4, 4), abs=1e-5)


def test_lm_is_the_mean_over_supervised_tokens(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "decoder"))
    batch = made.batch(*CAPTIONS)
    assert batch.prompts is not None
    hidden, target = supervised(
        made.model.write(made.model.see(batch.images), batch.prompts).hidden, batch.prompts.labels
    )
    expected = language(made.model.logits(hidden), target)
    torch.testing.assert_close(made.task(batch).each["lm"], expected.detach())


def test_the_qformer_writes_after_its_own_start_token(tmp_path: Path) -> None:
    made = Made(tiny_run(tmp_path, "qformer"))
    captions = made.batch(*CAPTIONS).captions
    text = written_by_qformer(captions, made.tokenizer.dec)
    assert text.ids[:, 0].tolist() == [made.tokenizer.dec] * 4
    assert torch.equal(text.ids[:, 1:], captions.ids[:, 1:])
    assert torch.equal(text.labels, captions.labels)
    assert captions.ids[:, 0].tolist() == [made.tokenizer.bos] * 4  # what ITC and ITM read is as it was


def test_several_captions_of_one_image(tmp_path: Path) -> None:
    samples = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (("png", picture("red")), ("txt", b"a\nb\nc"))]
    shards = pack(tmp_path / "squares.tar", samples)
    made = Made(tiny_run(tmp_path, "qformer", f"data.train={shards}", "data.captions_per_image=2"))
    batch = next(made.loader.train([0])).to("cpu")
    assert batch.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    losses = made.task(batch)
    losses.total.backward()
    assert losses.each["itc"].isfinite()
    assert losses.each["itm"].isfinite()  # all pairs match here, so there are no negatives
    assert Itc().share(batch) == 8


def test_parts_that_learn_nothing_stay_in_evaluation_mode(tmp_path: Path) -> None:
    only = [{"match": "connector.*", "lr": 1e-3}, {"match": ".*", "lr": None}]
    made = Made(tiny_run(tmp_path, "decoder", params=only))
    made.task.train()
    awake = {name.split(".")[1] for name, module in made.task.named_modules() if module.training and "." in name}
    assert awake == {"connector"}
