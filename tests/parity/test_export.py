"""What `vlm export` writes opens in transformers: the same weights, logits, settings and ids."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from tests.parity import test_lavis, test_open_clip
from tests.parity.blip2 import compared, expected
from tests.parity.decoders import logit_gap
from tests.parity.exported import (
    CLIP,
    END,
    LANGUAGES,
    SIZE,
    SYSTEMS,
    TEXT,
    logits,
    opened,
    published,
    settings,
    tokenizer_of,
    words,
)
from tests.parity.noise import gap, noise
from vlm import build
from vlm.config.language import TransformerLanguage
from vlm.data.batch import Text
from vlm.data.tokenizer_files import save_tokenizer
from vlm.export import export, write_model
from vlm.model.connector import MlpConnector
from vlm.model.published import lavis, llava
from vlm.model.published.folder import Texts
from vlm.model.published.load import load, open_checkpoint
from vlm.model.text import PaddedTextEncoder
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.fill import fill_from
from vlm.model.weights.llama import llama_table
from vlm.model.weights.llava import llava_table
from vlm.model.weights.open_clip import hf_clip_table, open_clip_table
from vlm.nn.tokens import IMAGE_ID

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
    end = settings(folder).get("text_config", {}).get("eos_token_id", 2)
    write_model(model, Texts(words(), [end], words() if read else None), tmp_path / "out", "it")
    before, after = opened(folder), opened(tmp_path / "out")
    state = after.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
    assert gap(logits(before), logits(after)) == 0
    assert tokenizer_of(tmp_path / "out").control == tokenizer_of(folder).control


@torch.no_grad()
def test_the_last_block_of_llava_has_no_norm_after_it(tmp_path: Path) -> None:
    ours = load(str(published("llava all", tmp_path / "given"))).model
    maker = torch.Generator().manual_seed(1)  # as `logits` draws
    pixels, ids = torch.randn(2, 3, SIZE, SIZE, generator=maker), torch.randint(3, 270, (2, 13), generator=maker)
    ids = torch.cat([torch.full((2, 17), IMAGE_ID), ids], 1)
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool), ids)
    found = ours.logits(ours.write(ours.see(pixels), text).hidden)
    assert gap(found, logits(opened(tmp_path / "given"))) < 1e-5


@torch.no_grad()
def test_one_layer_where_the_layout_has_two(tmp_path: Path) -> None:
    ours = load(str(published("llava", tmp_path / "given"))).model
    ours.connector = MlpConnector(48, 40, 16, depth=1)
    write_model(ours, Texts(words(), [2]), tmp_path / "out", "it")
    assert settings(tmp_path / "out")["projector_hidden_act"] == "linear"
    theirs, again = opened(tmp_path / "out"), load(str(tmp_path / "out")).model
    image = torch.randn(2, 16, 48)
    assert again.connector is not None
    assert torch.equal(again.connector(image), ours.connector(image))
    assert gap(theirs.model.multi_modal_projector(image), ours.connector(image)) < 1e-6
    table = llava_table(llama_table(False), depth=1)
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["multi_modal_projector.linear_2.weight"] *= 2
    with pytest.raises(ValueError, match="two layers without an activation between them"):
        table.to_ours(state)


def test_llava_before_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    ours = load(str(published("llava", tmp_path / "given"))).model
    ours.language = load(str(published("t5", tmp_path / "t5"))).model.language
    with pytest.raises(ValueError, match=r"^it: language: an encoder-decoder \(T5\), and LLaVA's is a decoder"):
        write_model(ours, Texts(words(), [2]), tmp_path / "out", "it")


def test_siglip_is_padded_as_its_tokenizer_says(tmp_path: Path) -> None:
    folder = published("siglip", tmp_path / "given")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "pad_token": "<dec>"}))
    text = load(str(folder)).model.text
    assert isinstance(text, PaddedTextEncoder)
    assert text.pad == tokenizer_of(folder).pad == 3 != settings(folder)["text_config"]["pad_token_id"]


@pytest.mark.parametrize("kind", ["opt", "t5", "instruct", "instruct t5"])
def test_files_of_lavis(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lavis, "BLOCKS", 3)
    theirs, paths = test_lavis.made(kind, tmp_path)
    save_tokenizer(words(), paths["language"], ends=False)
    (tmp_path / "bert").mkdir()
    save_tokenizer(words(), tmp_path / "bert", ends=True)
    parts = {name: str(path) for name, path in paths.items() if name != "main"}
    if kind.startswith("instruct"):
        with pytest.raises(ValueError, match=r"give BERT's with \[DEC\] as --part qformer_tokenizer=FOLDER$"):
            export(str(paths["main"]), tmp_path / "out", parts)
        parts["qformer_tokenizer"] = str(tmp_path / "bert")
    lines = export(str(paths["main"]), tmp_path / "out", parts)
    assert any("eps=1e-05 here and 1e-06 there" in line for line in lines)
    theirs.vision_model.post_layernorm.eps = 1e-6
    after = opened(tmp_path / "out")
    images, text, asked = test_lavis.inputs(kind)
    wanted = expected(theirs, images, text, asked)[0]
    after.config.image_token_id = theirs.config.image_token_id  # a placeholder that the language model does not read
    found = expected(after, images, text, asked)[0][..., : wanted.shape[-1]]
    assert compared(found, wanted, text) < 1e-5
    state = after.state_dict()
    for name, value in theirs.state_dict().items():
        if name.endswith("qkv.bias"):  # EVA has no bias of the key
            value = torch.cat([value[:176], torch.zeros(176), value[352:]])
        assert torch.equal(state[name][: len(value)], value), name


def test_a_file_of_openai(tmp_path: Path) -> None:
    """OpenAI's names from Hugging Face's, by our two tables; its heads are 64 wide."""
    text = {**TEXT, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    eye = {**CLIP, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=eye, projection_dim=24)).eval()
    noise(theirs, scale=0.15)
    ours = hf_clip_table().to_ours(theirs.state_dict())
    torch.save(open_clip_table().to_theirs(ours), tmp_path / "clip.pt")
    found = open_checkpoint(str(tmp_path / "clip.pt"))
    fill_from(found.model, found.sources)
    write_model(found.model, Texts(words(), [END]), tmp_path / "out", "it")
    after = opened(tmp_path / "out")
    state = after.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    assert gap(logits(after), logits(theirs)) < 1e-6


@pytest.mark.parametrize("name", ["plain", "timm", "siglip"])
@torch.no_grad()
def test_open_clip_keeps_its_layout(name: str, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    theirs, config, file = test_open_clip.hub(name, tmp_path / "given")
    export(str(tmp_path / "given"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text()) == config
    one, other = load_file(file), load_file(tmp_path / "out" / file.name)
    assert set(one) == set(other) and all(torch.equal(value, other[key]) for key, value in one.items())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    images, text = test_open_clip.given(name)
    wanted, found = (test_open_clip.expected(model, images, text.ids) for model in (theirs, again))
    assert all(gap(a, b) < 1e-6 for a, b in zip(wanted, found, strict=True))


def test_a_folder_of_llavas_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tower lies elsewhere, and has CLIP's name for a size of its own here."""
    monkeypatch.setattr(llava, "TOWER", {**CLIP, "image_size": 336, "patch_size": 84})
    hub, own = published("llava", tmp_path / "hub"), tmp_path / "own"
    text = {**settings(hub)["text_config"], "model_type": "llava_llama", "mm_vision_select_layer": -2}
    text["max_position_embeddings"] = 999
    mm = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    save_tokenizer(words(), _made(own), ends=False)
    (own / "config.json").write_text(json.dumps({**text, **mm}))
    eye = {**CLIP, "image_size": 336, "patch_size": 84}
    tower = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=eye, projection_dim=24))
    noise(tower.eval(), scale=0.15)
    tower.save_pretrained(tmp_path / "tower")
    given = load_file(hub / "model.safetensors")
    spelt = [(r"^language_model\.", ""), (r"^multi_modal_projector\.linear_1", "model.mm_projector.0")]
    weights = {}
    for name, value in given.items():
        for old, new in [*spelt, (r"^multi_modal_projector\.linear_2", "model.mm_projector.2")]:
            name = re.sub(old, new, name)
        weights |= {} if name.startswith("vision_tower") else {name: value}
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    export(str(own), tmp_path / "out", {"vision": str(tmp_path / "tower")})
    found = opened(tmp_path / "out")
    state, whole = found.state_dict(), opened(hub).state_dict()
    same = [name for name in whole if "vision_tower" not in name]
    assert all(torch.equal(state[name], whole[name]) for name in same)
    own_eye = tower.vision_model.state_dict()
    assert all(torch.equal(state[f"model.vision_tower.{name}"], value) for name, value in own_eye.items())
    assert found.config.text_config.max_position_embeddings == 999
    assert found.config.vision_config.patch_size == 84 and found.config.vision_feature_layer == -2
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("fact", [{"vision_feature_layer": -1}, {"projector_hidden_act": "linear"}])
def test_changed_settings_are_noticed(fact: dict[str, Any], tmp_path: Path) -> None:
    folder, out = published("llava", tmp_path / "given"), tmp_path / "out"
    write_model(load(str(folder)).model, Texts(words(), [2]), out, "it")
    (out / "config.json").write_text(json.dumps({**settings(out), **fact}))
    assert gap(logits(opened(folder)), logits(opened(out))) > 1e-3


def test_of_another_type_and_in_shards(tmp_path: Path) -> None:
    folder = published("llama", tmp_path / "given")
    export(str(folder), tmp_path / "out", dtype="bfloat16", shard_gb=2e-5)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert settings(tmp_path / "out") == {**settings(folder), "dtype": "bfloat16"}
    before, after = opened(folder).state_dict(), opened(tmp_path / "out").state_dict()
    assert all(torch.equal(value.bfloat16(), after[name]) for name, value in before.items())


def test_an_end_that_transformers_would_look_for_elsewhere(tmp_path: Path) -> None:
    model = load(str(published("clip", tmp_path / "given"))).model
    with pytest.raises(ValueError, match="text: the end of a text has the id 2, by which transformers knows"):
        write_model(model, Texts(words(), [2]), tmp_path / "out", "it")


def small(**settings: Any) -> VisionLanguageModel:
    """A language model alone, of settings of our own."""
    given = TransformerLanguage(kind="transformer", dim=32, layers=2, heads=2, **settings)
    return VisionLanguageModel(language=build.decoder(given, 280))


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({}, "llama"),
        ({"tied": False, "mixer": {"kv_heads": 1, "theta": 500.0}}, "llama"),
        ({"mixer": {"bias": True}}, "qwen2"),
        ({"mixer": {"head_norm": True}}, "qwen3"),
        ({"mixer": {"window": 4}}, "mistral"),
        ({"ffn": {"kind": "moe", "experts": 4}}, "mixtral"),
    ],
)
def test_decoders_of_our_own(settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    model = small(**settings)
    noise(model, scale=0.15)
    write_model(model, Texts(words(), [2]), tmp_path / "out", "it")
    theirs = opened(tmp_path / "out")
    assert theirs.config.model_type == family
    assert model.language is not None
    assert logit_gap(model.language.eval(), theirs) < 1e-5


@pytest.mark.parametrize(
    ("settings", "words_of_it"),
    [
        ({"mixer": {"kind": "retention"}}, "block 0 has retention"),
        ({"ffn": {"kind": "moe", "shared": 1}}, "shared experts or another router than Mixtral's"),
        ({"ffn": {"kind": "moe", "router": "sigmoid"}}, "another router than Mixtral's"),
        ({"ffn": {"kind": "moe", "dense_blocks": 1}}, "block 0 is dense beside blocks with experts"),
        ({"norm": "layer"}, "has RMSNorm in every published family"),
        ({"placement": "post"}, "norms after the branches"),
        ({"mixer": {"max_positions": 20}}, "not as OPT has them"),
        ({"mixer": {"bias": True, "head_norm": True}}, "no published family has biases of query, key and value and"),
    ],
)
def test_what_has_no_layout_is_refused(settings: dict[str, Any], words_of_it: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words_of_it) as told:
        write_model(small(**settings), Texts(words(), [2]), tmp_path / "out", "it")
    assert str(told.value).startswith("it: language: cannot be exported: ")
    assert str(told.value).endswith("experts as Mixtral has them, OPT, T5")
    assert not list(tmp_path.iterdir())


def test_folders_are_not_replaced_by_mistake(tmp_path: Path) -> None:
    folder, out = published("llama", tmp_path / "given"), tmp_path / "out"
    export(str(folder), out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"out: exists already; choose another folder, or --overwrite it$"):
        export(str(folder), out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    export(str(folder), out, dtype="float16", overwrite=True)
    assert settings(out)["dtype"] == "float16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"mine: holds letter\.txt and is no exported model"):
        export(str(folder), tmp_path / "mine", overwrite=True)
    for inside in (folder, folder / "deeper", tmp_path):
        with pytest.raises(ValueError, match=r"lie in each other|exists already"):
            export(str(folder), inside)
    assert {path.name for path in tmp_path.iterdir()} == {"given", "out", "mine"}
