"""`vlm export`: runs of ours open in transformers as the systems that their parts are; what cannot is refused."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.command import Commands
from tests.parity.blip2 import run as written
from tests.parity.exported import opened, settings
from tests.parity.noise import gap
from vlm.data.batch import Text
from vlm.export import write_model
from vlm.model.published.folder import Texts
from vlm.model.qformer import QFormer
from vlm.nn.adapter import adapters
from vlm.nn.tokens import IGNORE, IMAGE_ID
from vlm.restore import Trained, restore

ROOT = Path(__file__).parents[1]
SHARD = ROOT / "vlm" / "quickstart" / "data" / "train-0000.tar"
EYE = (
    "hidden_size: 48, intermediate_size: 96, num_hidden_layers: 3, num_attention_heads: 4, image_size: 32, "
    "patch_size: 8"
)
CLIP = f"{{kind: published, architecture: {{model_type: clip_vision_model, {EYE}}}, class_token: drop, layer: -2}}"
WHOLE = CLIP.replace(", class_token: drop, layer: -2", "")
BLIP2 = f"{{kind: published, architecture: {{model_type: blip_2_vision_model, {EYE}}}}}"
QFORMER = "{kind: qformer, dim: 32, layers: 2, heads: 2, text: false}"
LLAMA = "{kind: transformer, dim: 64, layers: 2, heads: 4, mixer: {kv_heads: 2}}"
COMMON = [
    "model.init={vision: null, connector: null, language: null}",
    "tokenizer={kind: bpe, vocab: 400}",
    "data.augment=null",
    f"data.train={SHARD}",
    "train.batch_size=4",
]
STEPS = ["train.steps=2", "train.warmup=0", "train.log_every=1", "train.precision=float32"]
LEARNS = ["train.params=[{match: .*, lr: 1.0e-2}]"]
CHAT = ["data.kind=chats", "data.template=vicuna_v1", "data.max_tokens=200", "data.questions=['What is this?']"]
LORA = ["model.lora=[{match: 'language.*(query|value)', rank: 4}]"]
RUNS = {
    "llava": ["llava15_stage1", *COMMON, f"model.vision={CLIP}"],
    "linear": [
        "llava_stage1",
        *COMMON,
        f"model.vision={CLIP}",
        "model.connector={kind: linear}",
        f"model.language={LLAMA}",
        *CHAT,
        *LORA,
        *LEARNS,
    ],
    "opt": ["blip2_stage2_opt", *COMMON, f"model.vision={BLIP2}"],
    "t5": ["blip2_stage2_t5", *COMMON, f"model.vision={BLIP2}", "model.connector.text=true"],
    "instructblip": ["instructblip", *COMMON, f"model.vision={BLIP2}"],
    "clip": ["clip", *COMMON, f"model.vision={WHOLE}", "model.connector={kind: first}", "tokenizer={kind: clip}"],
    "stage 1": ["blip2_stage1", *COMMON, f"model.vision={BLIP2}"],
}
WRITERS = ("llava", "linear", "opt", "t5", "instructblip")


@pytest.fixture(scope="module")
def trained(vlm: Commands, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of RUNS, made when it is first asked for."""
    place = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Path:
        if not (place / name).exists():
            config, *given = RUNS[name]
            done = vlm("train", ROOT / f"configs/tiny/{config}.yaml", *given, *STEPS, "--out", name, folder=place)
            assert done.code == 0, done.err
        return place / name

    return make


def pictures(model: Any) -> tuple[list[Image.Image], Tensor]:
    """Two that are no squares, and as our encoder takes them."""
    noise = np.random.default_rng(1).integers(0, 255, (2, 5, 7, 3), dtype=np.uint8)
    found = [Image.fromarray(rows).resize((61, 44)) for rows in noise]
    return found, torch.stack([model.vision.transform(image) for image in found])


@torch.no_grad()
def ours(trained: Trained, asked: Tensor | None) -> tuple[Text, Tensor]:
    """A prompt with an image for each picture, and the logits of our model."""
    model = trained.model
    ids = torch.randint(4, 380, (2, 9), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.full((2, model.image_tokens), IMAGE_ID), ids], 1)
    said = Text(ids, torch.ones_like(ids, dtype=torch.bool), ids.masked_fill(ids == IMAGE_ID, IGNORE))
    if (start := model.reply_start) is not None:
        reply = torch.tensor([[start, 7, 9], [start, 30, 11]])
        said = Text(said.ids, said.valid, torch.full_like(ids, IGNORE), True, Text(reply, reply >= 0, reply))
    instruction = None if asked is None else Text(asked, torch.ones_like(asked, dtype=torch.bool), asked)
    return said, written(model, pictures(model)[1], said, instruction)[0]


@torch.no_grad()
def theirs(folder: Path, images: Tensor, said: Text, asked: Tensor | None) -> Tensor:
    """The logits of the same in transformers."""
    model = opened(folder)
    ids = said.ids.masked_fill(said.ids == IMAGE_ID, model.config.image_token_index)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": said.valid.long(), "pixel_values": images}
    if said.reply is not None:
        given["decoder_input_ids"] = said.reply.ids
    if asked is not None:
        given |= {"qformer_input_ids": asked, "qformer_attention_mask": torch.ones_like(asked)}
    out: Tensor = model(**given).logits
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_run_opens_in_transformers(vlm: Commands, trained: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    done = vlm("export", trained(name), "out", folder=tmp_path)
    assert (done.code, done.out) == (0, "out\n"), done.err
    restored, folder = restore(trained(name)), tmp_path / "out"
    if hasattr(restored.model.connector, "image_norm"):
        assert "the norm before the Q-Former has eps=1e-05 here and 1e-06 there" in done.err
        restored.model.connector.image_norm.eps = 1e-6
    asked = torch.tensor([[1, 5, 6, 2], [1, 9, 30, 2]]) if name == "instructblip" else None
    said, wanted = ours(restored, asked)
    raw, images = pictures(restored.model)
    found = theirs(folder, images, said, asked)
    assert float(wanted.std()) > 0.01
    assert gap(found[..., : wanted.shape[-1]], wanted) < 1e-5
    processor = transformers.AutoProcessor.from_pretrained(folder)
    pixels = processor.image_processor(images=raw, return_tensors="pt")["pixel_values"]
    assert gap(pixels, images) < 3 / 255 / 0.25
    text = "a red drum on white"
    ids = processor.tokenizer(text).input_ids
    end = [restored.tokenizer.eos] if name == "t5" else []
    assert ids == [*restored.tokenizer.start, *restored.tokenizer.encode(text), *end]
    both = processor(images=raw[0], text=f"<image> {text}" if name in ("llava", "linear") else text)
    assert list(both["input_ids"][0]).count(settings(folder)["image_token_index"]) == restored.model.image_tokens
    if name == "instructblip":
        assert list(both["qformer_input_ids"][0]) == [1, *restored.tokenizer.encode(text), 2]


@pytest.mark.slow
@torch.no_grad()
def test_a_chat_has_its_template(vlm: Commands, trained: Callable[[str], Path], tmp_path: Path) -> None:
    done = vlm("export", trained("linear"), "out", folder=tmp_path)
    assert done.code == 0 and "4 adapters merged" in done.err
    assert "one row more in the vocabulary: 400, the token that stands where an image is" in done.err
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    assert text.startswith("<bos>A chat between a curious user")
    assert text.endswith("USER: <image>\nWhat is this? ASSISTANT:")
    given = processor(images=pictures(restore(trained("linear")).model)[0][0], text=text, return_tensors="pt")
    model = opened(tmp_path / "out")
    assert model.generate(**given, max_new_tokens=5, do_sample=False).shape[1] > given["input_ids"].shape[1]


@pytest.mark.slow
@torch.no_grad()
def test_clip_and_stage_1(vlm: Commands, trained: Callable[[str], Path], tmp_path: Path) -> None:
    for name, first, last in (("clip", 49406, 49407), ("stage 1", 1, 2)):
        ids = torch.tensor([[first, 9, 30, last], [first, 55, 20, last]])
        words = Text(ids, torch.ones_like(ids, dtype=torch.bool), ids)
        done = vlm("export", trained(name), name, folder=tmp_path)
        assert done.code == 0, done.err
        model, theirs = restore(trained(name)).model, opened(tmp_path / name)
        assert model.contrast is not None
        images = pictures(model)[1]
        if name == "clip":
            found = model.contrast(model.embed_image(model.see(images)), model.embed_text(words))
            assert gap(theirs(input_ids=ids, pixel_values=images).logits_per_image, found) < 1e-5
            continue
        assert "left out: the Q-Former's head for words" in done.err and "left out: the temperature, 0.0" in done.err
        assert isinstance(model.connector, QFormer) and isinstance(model.connector.image_norm, torch.nn.LayerNorm)
        model.connector.image_norm.eps = 1e-6
        seen = model.see(images)
        cosines = model.contrast(model.embed_image(seen), model.embed_text(words)) / model.contrast.log_scale.exp()
        assert (
            gap(theirs(images, ids, torch.ones_like(ids), use_image_text_matching_head=False).logits_per_image, cosines)
            < 1e-5
        )
        match = theirs(images, ids, torch.ones_like(ids), use_image_text_matching_head=True).logits_per_image
        assert gap(match, model.match_logits(seen, words)) < 1e-5


@pytest.mark.slow
def test_adapters_alone(vlm: Commands, trained: Callable[[str], Path], tmp_path: Path) -> None:
    run = trained("linear")
    for name, given in (("merged", []), ("adapters", ["--adapters"])):
        done = vlm("export", run, name, *given, folder=tmp_path)
        assert (done.code, done.out) == (0, f"{name}\n"), done.err
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    restored = restore(run)
    for name, adapter in adapters(restored.model).items():
        parent, _, child = name.rpartition(".")
        setattr(restored.model.get_submodule(parent), child, adapter.base)
    write_model(restored.model, Texts(restored.tokenizer, [2]), tmp_path / "base", "base")
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    model, merged = opened(tmp_path / "base"), opened(tmp_path / "merged")
    assert gap(model(input_ids=ids).logits, merged(input_ids=ids).logits) > 1e-3
    model.load_adapter(str(tmp_path / "adapters"))
    assert gap(model(input_ids=ids).logits, merged(input_ids=ids).logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("room", [1_000, 100_000])
def test_a_full_disk_leaves_nothing(vlm: Commands, trained: Callable[[str], Path], tmp_path: Path, room: int) -> None:
    run = trained("llava")

    def fill(process: int, errors: Path) -> None:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    done = vlm("export", run, "out", folder=tmp_path, meanwhile=fill)
    assert (done.code, done.out) == (1, ""), done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("vlm: could not write out: ") and last.endswith("; nothing was written")
    assert "File too large" in last and last.count("could not") == 1 and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [f"model.vision={CLIP}", "model.language={kind: transformer, dim: 64, heads: 2, mixer: {kind: retention}}"],
            "language: cannot be exported: block 0 has retention (RetNet), for which transformers has no class; there "
            "is a published layout for attention with gated_mlp (Llama and its like)",
        ),
        (
            [f"model.vision={CLIP}", f"model.connector={QFORMER}"],
            "vision (VisionTransformer): only BLIP-2's own ViT, which has no norm at its end, has a place before a Q-",
        ),
        (
            [
                f"model.vision={BLIP2}",
                "model.vision.layer=-2",
                f"model.connector={QFORMER}",
            ],
            "vision: BLIP-2 reads all tokens of its end, so model.vision.layer=-1 class_token=keep",
        ),
        ([], "vision (ResNet): CLIP's own ViT alone has a place in CLIP and LLaVA"),
        (
            [f"model.vision={CLIP}", "model.vision.layer=-1"],
            "vision: it is read after its last norm (model.vision.layer=-1); LLaVA reads what a block gives",
        ),
        (
            [f"model.vision={CLIP}", "model.connector.depth=3"],
            "connector: 3 layers of widths 128, 128, 128: LLaVA has one or two of the language model's width, 128",
        ),
    ],
)
def test_parts_of_no_published_system_are_refused(vlm: Commands, given: list[str], said: str, tmp_path: Path) -> None:
    config = ROOT / "configs/tiny/llava15_stage1.yaml"
    made = vlm("train", config, *COMMON, *given, *STEPS, "--out", "run", folder=tmp_path)
    assert made.code == 0, made.err
    done = vlm("export", "run", "out", folder=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(f"vlm: run: {said}")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "out"], "'nowhere' is neither a file or folder nor a name on the hub"),
        (["given", "out", "--part", "vision"], "'vision' is not NAME=SOURCE, such as vision=eva_vit_g.pth"),
        (["given", "out", "--adapters"], "given: --adapters is for the folder of a run"),
        (["given", "given"], "given: exists already; choose another folder, or --overwrite it"),
    ],
)
def test_wrong_arguments(vlm: Commands, arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text("{}")
    done = vlm("export", *arguments, folder=tmp_path)
    assert (done.code, done.out) == (2, "") and said in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"given"}
