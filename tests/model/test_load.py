"""Published folders and files, opened as `--model` opens them, write what their originals write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from tests import folders, folders_own
from tests.folders import QUERIES, Made, photographs, written
from tests.folders_own import Files
from tests.parity.noise import gap, noise
from vlm.captions import captions
from vlm.data.batch import pad
from vlm.data.text import encode_caption
from vlm.model.beam import Beams
from vlm.model.bert import Bert
from vlm.model.generate import Decoding, Sampling
from vlm.model.language import Decoder
from vlm.model.published.load import load
from vlm.model.seq2seq import EncoderDecoder
from vlm.ready import open_model
from vlm.restore import Ready

PICTURES = photographs()
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
VICUNA = f"{SYSTEM} USER: <image>\n{{}} ASSISTANT:"
LLAVA_CAPTION = "Provide a one-sentence caption for the provided image."
BEAMS = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8}
LONG = {"num_beams": 5, "max_new_tokens": 80, "min_new_tokens": 10, "repetition_penalty": 1.5}
SHORT = {"num_beams": 5, "max_new_tokens": 10, "min_new_tokens": 1}


def whole(made: Made) -> Files:
    return Files(made.folder, {}, made)


Case = tuple[str, str, dict[str, Any], str, dict[str, Any]]
MADE: dict[str, Callable[[Path], Files]] = {
    "blip2 opt": lambda place: whole(folders.blip2(place, "opt")),
    "blip2 t5": lambda place: whole(folders.blip2(place, "t5")),
    "instructblip": lambda place: whole(folders.instructblip(place)),
    "llava": lambda place: whole(folders.llava(place)),
    "lavis opt": lambda place: folders_own.lavis(place, "opt"),
    "lavis vicuna": lambda place: folders_own.lavis(place, "vicuna"),
    "minigpt4": folders_own.minigpt4,
}
# What is asked for a caption, and how; then for an answer. The names of these numbers are transformers'.
CASES: dict[str, Case] = {
    "blip2 opt": ("a photo of", "Question: red? Answer:", BEAMS, "red?", {**SHORT, "length_penalty": 0.0}),
    "blip2 t5": ("a photo of", "Question: red? Answer:", BEAMS, "red?", {**SHORT, "length_penalty": -1.0}),
    "instructblip": (
        "A short image caption.",
        "Question: red? Short Answer:",
        LONG,
        "red?",
        {**SHORT, "length_penalty": -1.0},
    ),
    "llava": (
        VICUNA.format(LLAVA_CAPTION),
        VICUNA.format("red?\nAnswer the question using a single word or phrase."),
        {"max_new_tokens": 64},
        "red?",
        {"max_new_tokens": 16},
    ),
}
CASES["lavis opt"], CASES["lavis vicuna"] = CASES["blip2 opt"], CASES["instructblip"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """Each is made once."""
    found: dict[str, Files] = {}

    def make(name: str) -> Files:
        if name not in found:
            found[name] = MADE[name](tmp_path_factory.mktemp("published") / name.replace(" ", "-"))
        return found[name]

    return make


def opened(given: Files) -> Ready:
    return open_model(str(given.main), None, given.parts)


def pixels(ready: Ready) -> Tensor:
    assert ready.model.vision is not None
    return torch.stack([ready.model.vision.transform(picture) for picture in PICTURES])


def say(ready: Ready, how: Decoding, question: str | None = None) -> list[str]:
    return captions(ready, pixels(ready), how, question=question)


@pytest.mark.parametrize("name", CASES)
def test_captions_are_those_of_the_original(name: str, files: Callable[[str], Files]) -> None:
    ready, (prompt, _, how, _, _) = opened(files(name)), CASES[name]
    greedy = written(files(name).made, PICTURES, prompt, max_new_tokens=12, do_sample=False)
    assert len(set(greedy)) == len(PICTURES), "noise that hides the pictures"
    assert say(ready, Sampling(12)) == greedy
    assert ready.usage is not None and ready.writes
    first = captions(ready, pixels(ready)[:1], ready.usage.captions)
    assert first == written(files(name).made, PICTURES[:1], prompt, do_sample=False, **how)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_the_original(name: str, files: Callable[[str], Files]) -> None:
    ready, (_, prompt, _, question, how) = opened(files(name)), CASES[name]
    assert ready.usage is not None
    found = say(ready, ready.usage.answers, question)
    assert found == written(files(name).made, PICTURES, prompt, do_sample=False, **how)
    assert found != say(ready, ready.usage.answers, "blue?")


def test_minigpt4_s_picture_stands_in_the_middle(files: Callable[[str], Files]) -> None:
    given = files("minigpt4")
    processor, wanted = given.made.processor, list[str]()
    prompt = f"###Human: <Img>{'<image>' * QUERIES}</Img> Describe this image in detail. ###Assistant: "
    text = processor.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    for picture in PICTURES:
        seen = processor(images=picture, return_tensors="pt")
        ids = given.made.model.generate(**seen, **text, max_new_tokens=12, do_sample=False)[0]
        wanted.append(processor.tokenizer.decode(ids[text["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    ready = opened(given)
    assert say(ready, Sampling(12)) == wanted and len(set(wanted)) > 1
    assert ready.usage is not None and ready.usage.stop == ("###",)


@pytest.mark.parametrize("layout", ["memory", "authors"])
def test_llava_in_its_other_layouts(layout: str, files: Callable[[str], Files], tmp_path: Path) -> None:
    made = files("llava").made
    if layout == "memory":
        given = Files(folders_own.llava_in_memory(made, tmp_path / "llava"), {}, made)
    else:
        given = folders_own.llava_of_authors(made, tmp_path / "llava")
    ready = opened(given)
    assert say(ready, Sampling(12)) == say(opened(files("llava")), Sampling(12))
    assert ready.model.vision is not None
    transform = ready.model.vision.transform
    assert transform.resize == ("padded" if layout == "authors" else "shortest")
    if layout == "authors":  # without CLIP's file the size is known all the same, and so is the padding
        (Path(given.parts["vision"]) / "preprocessor_config.json").unlink()
        again = opened(given).model.vision
        assert again is not None
        assert (again.transform.resize, again.transform.fill) == (transform.resize, transform.fill)


@pytest.mark.parametrize(
    ("control", "template"), [("<|start_header_id|>", "llama3"), ("<|im_start|>", "chatml"), (None, "vicuna_v1")]
)
def test_llava_talks_as_its_language_model(control: str | None, template: str, tmp_path: Path) -> None:
    tokenizer = folders.clip_words()
    names = {"llama3": [control, "<|end_header_id|>", "<|eot_id|>"], "chatml": [control, "<|im_end|>"]}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *names.get(template, [])]})
    made = folders.llava(tmp_path, tokenizer, eos_token_id=[1])
    tokenizer.save_pretrained(tmp_path)
    ready = open_model(str(tmp_path))
    assert ready.usage is not None and ready.usage.template == template
    prompts = {
        "llama3": "{0}user{1}\n\n<image>\n{{}}<|eot_id|>{0}assistant{1}\n\n".format(control, "<|end_header_id|>"),
        "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n{}"
        "<|im_end|>\n<|im_start|>assistant\n",
        "vicuna_v1": VICUNA,
    }
    prompt = prompts[template].format(LLAVA_CAPTION)
    tokenizer.backend_tokenizer.post_processor = None
    start = "" if template == "chatml" else "<|startoftext|>"
    ends = {"llama3": ["<|eot_id|>"], "chatml": ["<|im_end|>"]}.get(template, [])
    eos = [1, *(tokenizer.convert_tokens_to_ids(end) for end in ends)]
    wanted = written(made, PICTURES, start + prompt, max_new_tokens=12, do_sample=False, eos_token_id=eos)
    assert say(ready, Sampling(12)) == wanted and len(set(wanted)) > 1


def test_generation_config_comes_before_the_authors_way(tmp_path: Path) -> None:
    said = {"num_beams": 3, "max_new_tokens": 9, "length_penalty": -0.5, "repetition_penalty": 1.3}
    made = folders.blip2(tmp_path, "opt", **said)
    ready = open_model(str(tmp_path))
    assert ready.usage is not None
    assert ready.usage.captions == Beams(3, 9, 8, -0.5, repetition_penalty=1.3)
    wanted = written(made, PICTURES, "a photo of", do_sample=False, min_new_tokens=8, **said)
    assert say(ready, ready.usage.captions) == wanted
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "num_beams": 4}))
    with pytest.raises(ValueError, match=r"generation_config\.json: do_sample=true with num_beams=4: beams are not dr"):
        open_model(str(tmp_path))


def test_several_ends(tmp_path: Path) -> None:
    made = folders.llava(tmp_path)
    plain = open_model(str(tmp_path))
    texts = say(plain, Sampling(12))
    prompt = VICUNA.format(LLAVA_CAPTION)
    given = made.processor(images=PICTURES[0], text=prompt, return_tensors="pt")
    given.pop("token_type_ids", None)
    asked = given["input_ids"][0].tolist()
    ids = made.model.generate(**given, max_new_tokens=12, do_sample=False)[0, len(asked) :].tolist()
    first, second = [i for i in ids[1:] if i not in asked][:2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, second, first]}))
    ready = open_model(str(tmp_path))
    assert ready.tokenizer.ends == (2, second, first)
    cut = say(ready, Sampling(12))[0]
    assert cut == made.processor.tokenizer.decode(ids[: ids.index(first)]).strip() and cut != texts[0]


def test_half_precision_is_fp32_on_a_cpu(files: Callable[[str], Files], tmp_path: Path) -> None:
    made = files("llava").made
    given = folders_own.llava_in_memory(made, tmp_path / "half")
    torch.save({name: value.half() for name, value in made.model.state_dict().items()}, given / "pytorch_model.bin")
    types = {tensor.dtype for tensor in load(str(given)).model.parameters()}
    assert types == {torch.float32}
    kept = {tensor.dtype for tensor in load(str(given), dtype=torch.bfloat16).model.parameters()}
    assert kept == {torch.bfloat16}


def test_coca_writes_what_open_clip_writes(tmp_path: Path) -> None:
    folder, model, tokenizer = folders_own.coca(tmp_path / "coca")
    ready = open_model(str(folder))
    assert ready.writes and ready.usage is None
    wanted = [folders_own.coca_written(model, tokenizer, picture, 8) for picture in pixels(ready)]
    assert say(ready, Sampling(8)) == wanted and len(set(wanted)) > 1


def test_a_projector_alone(files: Callable[[str], Files], tmp_path: Path) -> None:
    made = files("llava").made
    given = folders_own.llava_of_authors(made, tmp_path / "llava")
    for file in given.main.glob("pytorch_model*"):
        file.unlink()
    state = made.model.model.multi_modal_projector.state_dict()
    names = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    weights = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in state.items()}
    torch.save(weights, given.main / "mm_projector.bin")
    language = tmp_path / "language"
    LlamaForCausalLM.save_pretrained(_language_of(made), language)
    (given.main / "tokenizer.model").rename(language / "tokenizer.model")
    (given.main / "tokenizer_config.json").rename(language / "tokenizer_config.json")
    ready = open_model(str(given.main), None, {**given.parts, "language": str(language)})
    assert say(ready, Sampling(12)) == say(opened(files("llava")), Sampling(12))


def _language_of(made: Made) -> LlamaForCausalLM:
    whole = LlamaForCausalLM(made.model.config.text_config)
    whole.model.load_state_dict(made.model.model.language_model.state_dict())
    whole.lm_head.load_state_dict(made.model.lm_head.state_dict())
    return whole


@torch.no_grad()
def test_a_file_of_openai_s_clip_has_a_vocabulary_here(tmp_path: Path) -> None:
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=64, patch_size=7, image_size=28)
    text = open_clip.model.CLIPTextCfg(context_length=12, width=64, heads=1, layers=1)
    theirs = open_clip.model.CLIP(16, vision, text, quick_gelu=True).eval()
    noise(theirs)
    save_file(theirs.state_dict(), tmp_path / "ViT-B-32.safetensors")
    ready = open_model(str(tmp_path / "ViT-B-32.safetensors"))
    texts = ["a red square", "two blue birds, and a fox"]
    wanted = theirs.encode_text(open_clip.tokenize(texts, context_length=12), normalize=True)
    encoded = [encode_caption(ready.tokenizer, line, ready.data.max_tokens) for line in texts]
    assert gap(ready.model.embed_text(pad(encoded, ready.tokenizer.pad)), wanted) < 1e-5
    seen = pixels(ready)
    assert gap(ready.model.embed_image(ready.model.see(seen))[:, 0], theirs.encode_image(seen, normalize=True)) < 1e-5


def test_parts_of_one_kind(tmp_path: Path) -> None:
    kinds = {"llama": ("language", Decoder), "t5": ("language", EncoderDecoder), "bert": ("text", Bert)}
    for name, (part, kind) in kinds.items():
        made = folders_own.bert(tmp_path / name) if name == "bert" else folders_own.language(tmp_path / name, name)
        ready = open_model(str(made.folder))
        assert isinstance(getattr(ready.model, part), kind) and not ready.writes
        text = "a red square"
        wanted = made.processor(text, add_special_tokens=False)["input_ids"]
        assert ready.tokenizer.encode(text) == wanted


def test_a_gguf_file_is_a_language_model_with_its_tokenizer(tmp_path: Path) -> None:
    from tests.parity.test_gguf import TEXTS, bpe, published, worst_gap, write

    theirs = published(tied=True)
    path = write(tmp_path / "model.gguf", theirs, tied=True)
    ready = open_model(str(path))
    assert isinstance(ready.model.language, Decoder)
    assert worst_gap(ready.model.language, theirs) < 1e-5
    assert [ready.tokenizer.encode(text) for text in TEXTS] == [bpe(300).encode(text).ids for text in TEXTS]


def test_a_part_in_place_of_its_own(files: Callable[[str], Files], tmp_path: Path) -> None:
    other = folders.llava(tmp_path / "other")
    language = tmp_path / "language"
    other.model.model.language_model.layers[0].mlp.up_proj.weight.data.mul_(-3)
    other.model.save_pretrained(language)
    found = load(str(files("llava").main), {"language": str(language)}).model
    plain = load(str(files("llava").main)).model
    changed = {
        name
        for (name, one), other in zip(found.state_dict().items(), plain.state_dict().values(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == {"language.stack.blocks.0.ffn.up.weight"}
    with pytest.raises(ValueError, match=r"part qformer: .* has no such part"):
        load(str(files("llava").main), {"qformer": str(language)})
    with pytest.raises(ValueError, match=r"part text: .* has no such part"):
        load(str(files("llava").main), {"text": str(language)})
