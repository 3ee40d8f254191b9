"""Published files in their authors' own layouts: LAVIS, MiniGPT-4, LLaVA's folders, open_clip, GGUF."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    CLIPConfig,
    CLIPModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from tests import folders
from tests.folders import QUERIES, SIDE, Made, merges, sentencepiece, word_pieces
from tests.parity.lavis import BERT, TOWER, lavis_names, save_lavis
from tests.parity.noise import noise
from vlm.model.published.load import load

SIDES = {**TOWER, "image_size": SIDE}


class Files(NamedTuple):
    """A file, the parts that it lacks, and the original of the whole."""

    main: Path
    parts: dict[str, str]
    made: Made

    @property
    def options(self) -> list[str]:
        """Of the command line."""
        given = [("--part", f"{name}={source}") for name, source in self.parts.items()]
        return ["--model", str(self.main), *(word for pair in given for word in pair)]


def lavis(folder: Path, family: str) -> Files:
    """BLIP-2 of LAVIS before "opt", or InstructBLIP before Vicuna ("vicuna")."""
    folder.mkdir()
    instructed = family == "vicuna"
    tokenizer = sentencepiece(folder / "language", "llama") if instructed else merges(folder / "language")
    size = len(tokenizer)
    text = folders.llama_config(size) if instructed else folders.opt_config(size, 2)
    reader = word_pieces(folder / "bert")
    kind = InstructBlipConfig if instructed else Blip2Config
    config = kind(
        vision_config=SIDES,
        qformer_config={**BERT, "vocab_size": len(reader)},
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=size - 1,
    )
    model: Any = (InstructBlipForConditionalGeneration if instructed else Blip2ForConditionalGeneration)(config)
    noise(model.eval(), scale=0.2)
    paths = _saved(model, folder, "llm_proj" if instructed else "opt_proj")
    parts = {name: str(paths[name]) for name in ("vision", "language")}
    pixels = folders.squash()
    if not instructed:
        return Files(paths["main"], parts, Made(folder, model, Blip2Processor(pixels, tokenizer, QUERIES)))
    parts["qformer_tokenizer"] = str(folder / "bert")
    return Files(paths["main"], parts, Made(folder, model, InstructBlipProcessor(pixels, tokenizer, reader, QUERIES)))


def lavis_stage1(folder: Path, temperature: float) -> Files:
    """LAVIS' first stage with its heads, tower and all, whose words are BERT's and [DEC]."""
    tokenizer = word_pieces(folder / "bert")
    size = len(tokenizer) + 1
    config = Blip2Config(
        vision_config=SIDES,
        qformer_config={**BERT, "vocab_size": size, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=20,
    )
    model = Blip2ForImageTextRetrieval(config)
    noise(model.eval(), scale=0.25)
    model.vision_model.post_layernorm.eps = 1e-5
    weights = {**lavis_names(model.state_dict(), ""), "temp": torch.tensor(temperature)}
    head, width = "Qformer.cls.predictions", 128
    weights[f"{head}.decoder.weight"] = weights["Qformer.bert.embeddings.word_embeddings.weight"]
    weights[f"{head}.decoder.bias"] = weights[f"{head}.bias"] = torch.randn(size) / 9
    for layer, shape in (("dense", (width, width)), ("LayerNorm", (width,))):
        weights[f"{head}.transform.{layer}.weight"] = torch.randn(shape) / 9
        weights[f"{head}.transform.{layer}.bias"] = torch.randn(width) / 9
    torch.save({"model": weights}, folder / "blip2_pretrained.pth")
    made = Made(folder, model, Blip2Processor(folders.squash(), tokenizer))
    return Files(folder / "blip2_pretrained.pth", {"tokenizer": str(folder / "bert")}, made)


def minigpt4(folder: Path) -> Files:
    """One layer of its authors, before Vicuna; the Q-Former is in a file of LAVIS for another language model."""
    folder.mkdir()
    tokenizer = sentencepiece(folder / "language", "llama")
    config = Blip2Config(
        vision_config=SIDES,
        qformer_config={**BERT, "vocab_size": 60},
        text_config=folders.llama_config(len(tokenizer)).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=len(tokenizer) - 1,
    )
    model = Blip2ForConditionalGeneration(config)
    noise(model.eval(), scale=0.2)
    paths = _saved(model, folder, "t5_proj")
    own = torch.load(paths["main"], weights_only=True)["model"]
    layer = {f"llama_proj.{part}": own[f"t5_proj.{part}"] for part in ("weight", "bias")}
    torch.save({"model": layer}, folder / "minigpt4.pth")
    parts = {"vision": paths["vision"], "qformer": paths["main"], "language": paths["language"]}
    made = Made(folder, model, Blip2Processor(folders.squash(), tokenizer, QUERIES))
    return Files(folder / "minigpt4.pth", {name: str(path) for name, path in parts.items()}, made)


def _saved(model: Any, folder: Path, projection: str) -> dict[str, Path]:
    """As `save_lavis`, with a tower of the blocks that BLIP-2 takes (it leaves out only the last of 40)."""
    paths = save_lavis(model, folder, projection)
    tower = torch.load(paths["vision"], weights_only=True)
    torch.save({name: value for name, value in tower.items() if not name.startswith("blocks.3.")}, paths["vision"])
    return paths


def llava_in_memory(made: Made, folder: Path) -> Path:
    """The folder with the names that the module has in memory, as one pickle."""
    _copy_settings(made.folder, folder)
    torch.save(made.model.state_dict(), folder / "pytorch_model.bin")
    return folder


def llava_of_authors(made: Made, folder: Path) -> Files:
    """As LLaVA's own code saves it, with CLIP in a folder beside it."""
    _copy_settings(made.folder, folder)
    (folder / "preprocessor_config.json").unlink()
    config = made.model.config
    own = {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps({**config.text_config.to_dict(), **own}))
    state = made.model.state_dict()
    tower = {name: value for name, value in state.items() if "vision_tower" in name}
    weights = {_of_authors(name): value for name, value in state.items() if name not in tower}
    half = len(weights) // 2
    names = list(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:half], "pytorch_model-00002-of-00002.bin": names[half:]}
    for file, those in shards.items():
        torch.save({name: weights[name] for name in those}, folder / file)
    where = {name: file for file, those in shards.items() for name in those}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    eyes = _clip_of(made, tower, folder.with_name(f"{folder.name}-clip"))
    return Files(folder, {"vision": str(eyes)}, made)


def _of_authors(name: str) -> str:
    plain = name.removeprefix("model.").removeprefix("language_model.")
    for i, layer in enumerate(("linear_1", "linear_2")):
        plain = plain.replace(f"multi_modal_projector.{layer}", f"mm_projector.{2 * i}")
    return plain if plain.startswith("lm_head") else f"model.{plain}"


def _clip_of(made: Made, tower: dict[str, torch.Tensor], folder: Path) -> Path:
    """A whole CLIP with this tower, and its processor."""
    vision = made.model.config.vision_config.to_dict()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**text, "vocab_size": 20}, vision_config=vision, projection_dim=16)
    model = CLIPModel(config)
    inner = {name.split("vision_tower.")[-1].removeprefix("vision_model."): value for name, value in tower.items()}
    model.vision_model.load_state_dict(inner)
    model.save_pretrained(folder)
    made.processor.image_processor.save_pretrained(folder)
    return folder


def _copy_settings(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())


def coca(folder: Path) -> tuple[Path, Any, PreTrainedTokenizerFast]:
    """open_clip's folder of a CoCa."""
    from open_clip.coca_model import CoCa
    from open_clip.push_to_hf_hub import save_config_for_hf
    from safetensors.torch import save_file

    from tests.parity.test_coca import CONFIG, TEXT, VISION

    folder.mkdir()
    tokenizer = folders.clip_words()
    tokenizer.save_pretrained(folder)
    text = {**TEXT, "vocab_size": len(tokenizer), "context_length": 16, "pad_id": len(tokenizer) - 1}
    config = {**CONFIG, "vision_cfg": VISION}
    config["text_cfg"] = {**CONFIG["text_cfg"], **text}
    config["multimodal_cfg"] = {**CONFIG["multimodal_cfg"], **text, "layers": 3, "heads": 2}
    model = CoCa(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    noise(model, scale=0.3)
    model.visual.image_mean, model.visual.image_std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder, model, tokenizer


@torch.no_grad()
def coca_written(model: Any, tokenizer: PreTrainedTokenizerFast, picture: torch.Tensor, count: int) -> str:
    """The likeliest words, one by one; open_clip's own `generate` needs an older transformers."""
    ids = torch.tensor([[0]])
    for _ in range(count):
        logits = model(picture[None], ids, output_labels=False)["logits"]
        ids = torch.cat([ids, logits[:, -1].argmax(1, keepdim=True)], 1)
    return " ".join(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).split())


def language(folder: Path, family: str) -> Made:
    """A Llama with its SentencePiece, or a T5."""
    tokenizer = sentencepiece(folder, family)
    if family == "llama":
        return folders.write(LlamaForCausalLM(folders.llama_config(len(tokenizer))), folder, tokenizer)
    model = T5ForConditionalGeneration(folders.t5_config(len(tokenizer)))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 40))
    return folders.write(model, folder, tokenizer)


def bert(folder: Path) -> Made:
    """MiniLM's kind: a BERT with word pieces."""
    tokenizer = word_pieces(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 56}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes))
    return folders.write(model, folder, tokenizer)


def open_folder(folder: Path) -> Any:
    """Our system of a folder."""
    return load(str(folder)).model


def load_language(folder: Path) -> Any:
    """Our language model of a folder."""
    return open_folder(folder).language


def everything(root: Path) -> None:
    """The folders and files that docs/published.md speaks of, pictures and a shard to try them on."""
    for name, family in (("blip2-opt", "opt"), ("blip2-t5", "t5")):
        folders.blip2(root / name, family)
    folders.instructblip(root / "instructblip")
    authors = llava_of_authors(folders.llava(root / "llava"), root / "llava-v1.5")
    Path(authors.parts["vision"]).rename(root / "clip-vit-large-patch14-336")
    folders.retrieval(root / "blip2-itm")
    folders.clip(root / "clip")
    language(root / "vicuna", "llama")
    bert(root / "bert-base-uncased")
    lavis(root / "lavis", "opt")
    (root / "photos").mkdir()
    for i, picture in enumerate(folders.photographs(4)):
        picture.save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text(f"{('red', 'blue', 'green', 'a red')[i]} square\n")


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
