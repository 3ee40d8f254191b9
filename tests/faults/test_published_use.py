"""Published checkpoints that cannot be used, on the command line: one message with what to do, code 2, no traceback."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import folders, folders_own
from tests.command import Commands
from tests.faults.test_published import Evil
from tests.folders import photographs
from vlm.model.weights.source import open_weights


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    photographs(1)[0].save(path)
    return path


@pytest.fixture
def told(vlm: Commands, picture: Path, tmp_path: Path) -> Callable[..., str]:
    """What `vlm caption` says instead of captions."""

    def run(model: object, *options: object, lines: int = 1) -> str:
        done = vlm("caption", picture, "--model", model, *options, folder=tmp_path, network="down")
        assert (done.code, done.out) == (2, ""), done.err
        assert "Traceback" not in done.err and len(done.err.splitlines()) == lines
        return done.err

    return run


def edit(folder: Path, name: str = "config.json", **changes: object) -> Path:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return folders.llava(tmp_path / "llava").folder


def test_a_family_that_is_not_known(told: Callable[..., str], tmp_path: Path) -> None:
    folder = folders_own.language(tmp_path / "language", "llama").folder
    found = told(edit(folder, model_type="mammba"))
    assert re.search(
        r"config\.json: is of no family that vlm knows \(.*Llama.*\); its tensors: lm_head\.weight, .* \(\d+ in all\); "
        r"the nearest is Llama, which knows 21 of them; its model_type is 'mammba'",
        found,
    )


def test_a_shard_that_is_missing(told: Callable[..., str], llava: Path) -> None:
    shard = sorted(llava.glob("*.safetensors"))[0]
    shard.unlink()
    assert f"names shards that are not there: {shard.name}; fetch them into the same folder" in told(llava)


def test_a_tensor_of_another_shape(told: Callable[..., str], llava: Path) -> None:
    vision = json.loads((llava / "config.json").read_text())["vision_config"]
    found = told(edit(llava, vision_config={**vision, "intermediate_size": 96}), lines=10)
    assert f"{llava} does not fit this model:" in found
    assert "mlp.c_fc.weight is 90x48, the model's is 96x48" in found


def test_a_tokenizer_that_is_missing(told: Callable[..., str], llava: Path) -> None:
    (llava / "tokenizer.model").unlink()
    found = told(llava)
    assert f"{llava}: no tokenizer in it (none of tokenizer.json, tokenizer.model, " in found
    assert "--part tokenizer=FOLDER" in found


def test_a_vocabulary_of_the_qformer_that_is_missing(told: Callable[..., str], tmp_path: Path) -> None:
    given = folders_own.lavis(tmp_path / "lavis", "vicuna")
    parts = [f"{name}={source}" for name, source in given.parts.items() if name != "qformer_tokenizer"]
    found = told(given.main, *(word for part in parts for word in ("--part", part)))
    assert "--part qformer_tokenizer=FOLDER, such as google-bert/bert-base-uncased" in found


def test_a_hub_name_without_a_network(told: Callable[..., str]) -> None:
    found = told("Nobody-Here/not-a-model")
    assert "Nobody-Here/not-a-model is not in the hub's cache, and the hub is out of reach (" in found
    assert "or download it elsewhere and give the folder in place of the name" in found


def test_a_pickle_with_code(told: Callable[..., str], llava: Path, tmp_path: Path) -> None:
    for file in llava.glob("*.safetensors*"):
        file.unlink()
    marker = tmp_path / "marker"
    torch.save({"weight": torch.zeros(2), "x": Evil(marker)}, llava / "pytorch_model.bin")
    assert "pytorch_model.bin: refused, for it is damaged or holds more than plain tensors (" in told(llava)
    assert not marker.exists()


def test_a_file_of_lavis_alone(told: Callable[..., str], tmp_path: Path) -> None:
    given = folders_own.lavis(tmp_path / "lavis", "opt")
    found = told(given.main)
    assert (
        f"{given.main}: holds a part of a system; give the rest of it as parts (--part NAME=SOURCE): vision: the image "
        "encoder: eva_vit_g.pth; language: the language model, of width 40: a folder of Hugging Face"
    ) in found
    assert "has no use for part audio; there are" in told(
        *given.options[1:], "--part", f"audio={given.parts['vision']}"
    )


def test_a_tower_that_is_only_named(told: Callable[..., str], llava: Path) -> None:
    folder = edit(llava, mm_vision_tower="openai/clip-vit-large-patch14-336")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({"model.mm_projector.0.weight": torch.zeros(40, 48)}, folder / "model.safetensors")
    found = told(folder)
    assert f"{folder}: its image encoder lies elsewhere (give its folder by --part vision=FOLDER): openai/clip" in found


@pytest.mark.parametrize("option", ["vision", "=x", "vision="])
def test_a_part_that_is_not_told_whole(vlm: Commands, picture: Path, tmp_path: Path, option: str) -> None:
    done = vlm("caption", picture, "--model", "m", "--part", option, folder=tmp_path)
    assert done.code == 2 and f"'{option}' is not NAME=SOURCE, such as vision=eva_vit_g.pth" in done.err
    twice = ("--part", "vision=a", "--part", "vision=b")
    assert "vision is given 2 times" in vlm("caption", picture, "--model", "m", *twice, folder=tmp_path).err


def test_a_preprocessor_of_another_model(told: Callable[..., str], llava: Path) -> None:
    edit(llava, "preprocessor_config.json", crop_size={"height": 20, "width": 20}, size={"shortest_edge": 20})
    assert (
        "preprocessor_config.json makes pictures of 20 x 20, and the image encoder of config.json takes 28 x 28: one "
        "of the two is another model's"
    ) in told(llava)


def test_weights_that_were_quantised(told: Callable[..., str], llava: Path, tmp_path: Path) -> None:
    edit(llava, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are quantised (gptq); give the checkpoint they were made from" in told(llava)
    folder = folders_own.language(tmp_path / "language", "llama").folder
    weights = open_weights(folder)
    whole = {name: weights.read(name) for name in weights}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    whole["model.layers.0.mlp.up_proj.weight"] = torch.zeros(72, 40, dtype=torch.int8)
    save_file(whole, folder / "model.safetensors")
    assert "up.weight is int8, which is not how the model computes" in told(folder, lines=2)


def test_a_model_that_cannot_do_it(told: Callable[..., str], tmp_path: Path) -> None:
    folder = folders_own.language(tmp_path / "language", "llama").folder
    assert "knows text alone: it cannot look at pictures" in told(folder)
    folder = folders.clip(tmp_path / "clip").folder
    assert "was trained without lm, so it cannot write captions" in told(folder)


def test_a_generation_config_that_nothing_can_do(told: Callable[..., str], llava: Path) -> None:
    (llava / "generation_config.json").write_text(json.dumps({"num_beams": 2, "do_sample": True}))
    assert "generation_config.json: do_sample=true with num_beams=2: beams are not drawn here" in told(llava)
    (llava / "generation_config.json").write_text(json.dumps({"max_new_tokens": 0}))
    assert "generation_config.json: max_new=0: at least 1" in told(llava)
