"""What `vlm export` writes opens in transformers: the same weights, logits, settings and ids."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.exported import LANGUAGES, SYSTEMS, logits, opened, published, settings, tokenizer_of, words
from tests.parity.noise import gap
from vlm.export import export, write_model
from vlm.model.published.folder import Texts
from vlm.model.published.load import load

EVERY = [*LANGUAGES, *SYSTEMS]


@pytest.fixture(scope="module", params=EVERY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(request.param, tmp_path_factory.mktemp("published"))


def test_as_it_was(folder: Path, tmp_path: Path) -> None:
    export(str(folder), tmp_path / "out")
    given, found = ({p.name for p in place.iterdir()} for place in (folder, tmp_path / "out"))
    assert found == given
    assert settings(tmp_path / "out") == settings(folder)
    one, other = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(logits(opened(folder)), logits(opened(tmp_path / "out")))


def test_from_its_modules_alone(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder)).model
    if settings(folder)["model_type"] == "siglip":
        with pytest.raises(ValueError, match=r"^it: these parts together are no published system"):
            write_model(model, Texts(words(), [2]), tmp_path / "out", "it")
        return
    read = "instructblip" in settings(folder)["model_type"]
    write_model(model, Texts(words(), [2], words() if read else None), tmp_path / "out", "it")
    before, after = opened(folder), opened(tmp_path / "out")
    state = after.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    assert gap(logits(before), logits(after)) == 0
    assert tokenizer_of(tmp_path / "out").control == tokenizer_of(folder).control
