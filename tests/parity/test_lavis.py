"""BLIP-2 and InstructBLIP from LAVIS' files are transformers' of the same weights; a file says what it lacks."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

from tests.parity.blip2 import (
    QUERIES,
    THEIR_IMAGE_ID,
    compared,
    expected,
    instructions,
    language_config,
    pictures,
    run,
    texts,
    untied,
)
from tests.parity.lavis import BERT, TOWER, config_of, lavis_names, opened, save_lavis
from tests.parity.noise import gap, noise
from tests.parity.published import same, written
from vlm.data.batch import Text
from vlm.model.published import lavis
from vlm.model.published.blip2 import blip2_part
from vlm.model.published.lavis import contents, lavis_system, needs, together
from vlm.model.weights.files import differences, load_strict, read

IDS = {"num_query_tokens": QUERIES, "image_token_index": THEIR_IMAGE_ID}
SYSTEMS = ["opt", "t5", "instruct", "instruct t5"]


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of a tower of four, as LAVIS takes 39 of 40."""
    monkeypatch.setattr(lavis, "BLOCKS", 3)


def published(kind: str) -> PreTrainedModel:
    """A system of transformers, noised."""
    text = language_config({"instruct": "llama"}.get(kind, kind.removeprefix("instruct "))).to_dict()
    settings = {"vision_config": TOWER, "qformer_config": BERT, "text_config": text, **IDS}
    instructed = kind.startswith("instruct")
    theirs = (
        InstructBlipForConditionalGeneration(InstructBlipConfig(**settings))
        if instructed
        else Blip2ForConditionalGeneration(Blip2Config(**settings))
    )
    untied(theirs)
    noise(theirs, scale=0.1)
    return theirs.eval()


def made(kind: str, folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    theirs = published(kind)
    projection = {"opt": "opt_proj", "instruct": "llm_proj"}.get(kind, "t5_proj")
    return theirs, save_lavis(theirs, folder, projection)


def inputs(kind: str) -> tuple[Tensor, Text, Text | None]:
    text = texts("t5" if kind.endswith("t5") else kind, [0, 0, 0], [9, 5, 7])
    return pictures(), text, instructions([8, 3, 5]) if kind.startswith("instruct") else None


@pytest.mark.parametrize("kind", SYSTEMS)
def test_logits_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    theirs, paths = made(kind, tmp_path)
    ours, _ = opened(paths)
    given = inputs(kind)
    (logits, loss), (wanted, wanted_loss) = run(ours, *given), expected(theirs, *given)
    assert float(wanted.detach().std()) > 0.3
    assert compared(logits, wanted, given[1]) < 1e-4
    assert gap(loss, wanted_loss) < 1e-5
    found = torch.autograd.grad(loss, [ours.connector.queries, ours.connector.out.weight])
    other = torch.autograd.grad(wanted_loss, [theirs.query_tokens, theirs.language_projection.weight])
    for mine, their in zip(found, other, strict=True):
        assert float(their.abs().max()) > 1e-3
        assert gap(mine, their.reshape(mine.shape)) < 1e-4


@pytest.mark.parametrize("kind", SYSTEMS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    _, paths = made(kind, tmp_path)
    ours, system = opened(paths)
    state = ours.state_dict()
    parts = {"vision": ("vision.",), "main": ("connector.", "contrast.", "match.")}
    for name, prefixes in parts.items():
        back = system.tables[name].to_theirs({k: v for k, v in state.items() if k.startswith(prefixes)})
        wanted = {k: v for k, v in read(paths[name]).items() if not k.endswith("position_ids")}
        left_out = ("blocks.3.", "norm.", "head.")
        assert same(back, {k: v for k, v in wanted.items() if not k.startswith(left_out)})


@pytest.mark.parametrize("kind", ["opt", "instruct"])
@torch.no_grad()
def test_written_in_hugging_face_s_layout(kind: str, tmp_path: Path) -> None:
    """From LAVIS' files by way of ours to a folder that transformers opens."""
    theirs, paths = made(kind, tmp_path)
    ours, _ = opened(paths)
    folder = tmp_path / "huggingface"
    theirs.config.save_pretrained(folder)
    part = blip2_part(config_of(folder), "config.json")
    load_strict(part.module, ours.state_dict(), "ours")
    written(part, folder / "model.safetensors")
    again = type(theirs).from_pretrained(folder).eval()
    again.vision_model.post_layernorm.eps = 1e-5  # one setting for all norms of the tower there
    given = inputs(kind)
    assert compared(expected(again, *given)[0], expected(theirs, *given)[0], given[1]) < 1e-5


@torch.no_grad()
def test_an_image_encoder_inside_the_file(tmp_path: Path) -> None:
    theirs, paths = made("opt", tmp_path)
    ours, system = opened({"main": tmp_path / "whole.pth", "language": paths["language"]})
    assert set(system.tables) == {"main", "language"}
    images, text, _ = inputs("opt")
    assert compared(run(ours, images, text)[0], expected(theirs, images, text)[0], text) < 1e-4
    # One that is given beside it is taken in its place.
    blank = {name: torch.zeros_like(value) for name, value in read(paths["vision"]).items()}
    torch.save(blank, tmp_path / "blank.pth")
    other, _ = opened({"main": tmp_path / "whole.pth", "vision": tmp_path / "blank.pth", "language": paths["language"]})
    assert not any(parameter.any() for parameter in other.vision.parameters())


@torch.no_grad()
def test_t5_has_the_exact_gelu_in_lavis(tmp_path: Path) -> None:
    """Google's own config.json says the approximate one, with which the published weights were never run."""
    theirs, paths = made("t5", tmp_path)
    file = paths["language"] / "config.json"
    config = json.loads(file.read_text())
    assert config["dense_act_fn"] == "gelu"
    file.write_text(json.dumps({**config, "dense_act_fn": "gelu_new"}))
    ours, _ = opened(paths)
    images, text, _ = inputs("t5")
    wanted = expected(theirs, images, text)[0]
    assert compared(run(ours, images, text)[0], wanted, text) < 1e-4
    for block in (*ours.language.encoder.blocks, *ours.language.decoder.blocks):
        block.ffn.activation = torch.nn.GELU("tanh")
    assert compared(run(ours, images, text)[0], wanted, text) > 2e-4


def test_what_a_file_holds_and_needs(tmp_path: Path) -> None:
    _, paths = made("opt", tmp_path)
    main, whole = read(paths["main"]), read(tmp_path / "whole.pth")
    assert contents(main) == {"qformer", "projection"} and contents(whole) == {"qformer", "projection", "vision"}
    assert contents(read(paths["vision"])) == {"vision"}
    assert set(needs(main, "a")) == {"vision", "language"} and set(needs(whole, "a")) == {"language"}
    with pytest.raises(ValueError, match=r"^blip2\.pth: .* vision: .*eva_vit_g\.pth; language: .* width 40"):
        lavis_system("blip2.pth", main)
    with pytest.raises(ValueError, match=r"^x\.pth: no file of LAVIS or MiniGPT-4; it holds conv\.weight"):
        needs({"conv.weight": torch.zeros(1)}, "x.pth")


def test_mistakes_are_told(tmp_path: Path) -> None:
    _, paths = made("opt", tmp_path)
    read_all = {name: read(path) for name, path in paths.items() if name != "language"}
    main, others = read_all.pop("main"), read_all

    def language(kind: str) -> object:
        return lavis.lavis_language(language_config(kind).to_dict(), "config.json")

    wide = {**main, "opt_proj.weight": torch.zeros(44, 128), "opt_proj.bias": torch.zeros(44)}
    with pytest.raises(ValueError, match=r"opt_proj is for a language model of width 44, this one has 40"):
        lavis_system("a.pth", wide, others, language("opt"))
    with pytest.raises(ValueError, match=r"a\.pth: has no use for part audio; there are language, qformer, vision"):
        lavis_system("a.pth", main, {**others, "audio": {}}, language("opt"))
    short = {name: value for name, value in main.items() if name != "query_tokens"}
    with pytest.raises(ValueError, match=r"a\.pth: cannot tell the sizes of this system, .* 'query_tokens'"):
        lavis_system("a.pth", short, others, language("opt"))
    strange = {**main, "llm_model.model.norm.weight": torch.zeros(40)}
    table = lavis_system("a.pth", strange, others, language("opt")).tables["main"]
    with pytest.raises(ValueError, match=r"LAVIS \(main\): .* does not know: llm_model\.model\.norm\.weight$"):
        table.to_ours(strange)


@pytest.mark.parametrize(("name", "value"), [("BLOCKS", 4), ("HEAD", 32), ("EVA_HEAD", 44)])
@torch.no_grad()
def test_changed_facts_are_noticed(name: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, paths = made("opt", tmp_path)
    images, text, _ = inputs("opt")
    monkeypatch.setattr(lavis, name, value)
    assert compared(run(opened(paths)[0], images, text)[0], expected(theirs, images, text)[0], text) > 1e-3


@torch.no_grad()
def test_changed_facts_of_instructblip_are_noticed(tmp_path: Path) -> None:
    theirs, paths = made("instruct", tmp_path)
    images, text, instruction = inputs("instruct")
    wanted = expected(theirs, images, text, instruction)[0]
    ours, _ = opened(paths)
    assert compared(run(ours, images, text)[0], wanted, text) > 1e-3  # without the instruction
    ours.connector.image_norm.eps = 1.0
    assert compared(run(ours, images, text, instruction)[0], wanted, text) > 1e-3


def test_the_released_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no file says: 12 heads of the Q-Former, 16 of ViT-g, 39 of its 40 blocks."""
    monkeypatch.setattr(lavis, "BLOCKS", 39)
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration(Blip2Config())
        state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("language_model.")}
        found = lavis_names(state, "opt_proj")
        tower = {k.removeprefix("visual_encoder."): v for k, v in found.items() if k.startswith("visual_encoder.")}
        last = {k.replace("blocks.38", "blocks.39"): v for k, v in tower.items() if k.startswith("blocks.38.")}
        main = {k: v for k, v in found.items() if not k.startswith(("visual_encoder.", "opt_proj."))}
        files = {"main": main, "vision": {**tower, **last}}
        system = lavis_system("blip2.pth", main, {"vision": files["vision"]})
        assert not differences(system.module.state_dict(), system.table.to_ours(together(files)))
    vision, qformer = theirs.config.vision_config, theirs.config.qformer_config
    blocks = system.module.vision.backbone.model.blocks
    assert [block.attn.num_heads for block in blocks] == [vision.num_attention_heads] * vision.num_hidden_layers
    heads = [block.mixer.heads for block in system.module.connector.stack.blocks]
    assert heads == [qformer.num_attention_heads] * qformer.num_hidden_layers
