"""Writes blip2.safetensors: what LAVIS' own BLIP-2 gives for random weights, in its first stage and before OPT.

    python -m venv oracle && . oracle/bin/activate
    pip install torch==2.14.1 torchvision==0.29.1 timm numpy regex requests pyyaml packaging filelock tqdm safetensors
    pip install --no-deps salesforce-lavis==1.0.2 transformers==4.36.2 tokenizers==0.15.2 huggingface_hub==0.24.7
    pip install --no-deps fairscale omegaconf antlr4-python3-runtime==4.9.3 iopath portalocker pandas pytz
    python tests/parity/golden/blip2.py

LAVIS cannot live with a present transformers, hence an environment of its own; the tests need only this file's output.
Its packages' `__init__` are passed over, for they import everything, and its constructors, for they download. Its
gathering of features over processes is left out: it cuts half of the contrastive gradient off (of the images in "text
to image", of the texts in "image to text"), which changes no loss, and which ours does not do.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, LAYERS, HEADS, QUERIES, LONGEST, VOCABULARY, EMBED = 24, 3, 4, 3, 16, 40, 8
TOWER, PICTURE, PAD, DEC, OPT_WIDTH = 20, 8, 0, 2, 16
B, T = 4, 7
GRADIENTS = (
    "query_tokens",
    "ln_vision.weight",
    "Qformer.bert.embeddings.word_embeddings.weight",
    "temp",
    "opt_proj.weight",
)


def lavis() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType, types.ModuleType]:
    """Its modules of both stages, of the Q-Former and of the image encoder."""
    spec = importlib.util.find_spec("lavis")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for name in ("lavis", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models", "lavis.common"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    base = importlib.import_module("lavis.models.base_model")
    sys.modules["lavis.models"].BaseModel = base.BaseModel  # type: ignore[attr-defined]
    names = ("blip2_models.blip2_qformer", "blip2_models.blip2_opt", "blip2_models.Qformer", "eva_vit")
    first, second, qformer, eva = (importlib.import_module(f"lavis.models.{name}") for name in names)
    return first, second, qformer, eva


class Tokens(dict[str, Tensor]):
    """What a tokenizer gives."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]

    def to(self, _device: Any) -> "Tokens":
        """Itself."""
        return self


class Tokenizer:
    """Gives always the same ids."""

    bos_token_id, pad_token_id, padding_side = DEC, PAD, "right"

    def __init__(self, ids: Tensor, valid: Tensor) -> None:
        self.tokens = Tokens(input_ids=ids, attention_mask=valid.long())

    def __call__(self, _text: Any, **_: Any) -> Tokens:
        return self.tokens


def noise(module: nn.Module) -> None:
    """Every parameter around 0, gains around 1."""
    maker = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=maker) * 0.3
        parameter.data = values + 1 if parameter.ndim == 1 and name.endswith("weight") else values


def frame(model: nn.Module, modules: tuple[types.ModuleType, ...], qformer: nn.Module) -> None:
    """What both stages have, as their constructors make it, in small."""
    nn.Module.__init__(model)
    eva, blip2 = modules[3], sys.modules["lavis.models.blip2_models.blip2"]
    norm = lambda dim: nn.LayerNorm(dim, eps=1e-6)  # noqa: E731 (as create_eva_vit_g has it)
    model.visual_encoder = eva.VisionTransformer(
        img_size=PICTURE,
        patch_size=4,
        embed_dim=TOWER,
        depth=2,
        num_heads=2,
        mlp_ratio=1.5,
        qkv_bias=True,
        norm_layer=norm,
    )
    model.ln_vision, model.Qformer = blip2.LayerNorm(TOWER), qformer
    model.query_tokens = nn.Parameter(torch.empty(1, QUERIES, WIDTH))


def bert(modules: tuple[types.ModuleType, ...]) -> nn.Module:
    """LAVIS' Q-Former with its head."""
    config = modules[2].BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
        pad_token_id=PAD,
    )
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq = TOWER, True, 2
    config.query_length = QUERIES
    made: nn.Module = modules[2].BertLMHeadModel(config)
    return made


def stage1(modules: tuple[types.ModuleType, ...], ids: Tensor, valid: Tensor) -> nn.Module:
    """`Blip2Qformer`."""
    modules[0].concat_all_gather = lambda features: features  # type: ignore[attr-defined]
    model: nn.Module = modules[0].Blip2Qformer.__new__(modules[0].Blip2Qformer)
    frame(model, modules, bert(modules))
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, EMBED), nn.Linear(WIDTH, EMBED)
    model.itm_head, model.temp = nn.Linear(WIDTH, 2), nn.Parameter(torch.empty([]))
    model.tokenizer, model.max_txt_len = Tokenizer(ids, valid), T
    noise(model)
    model.temp.data.fill_(0.07)
    return model.eval()


def stage2(modules: tuple[types.ModuleType, ...], ids: Tensor, valid: Tensor) -> nn.Module:
    """`Blip2OPT`."""
    from transformers import OPTConfig, OPTForCausalLM

    model: nn.Module = modules[1].Blip2OPT.__new__(modules[1].Blip2OPT)
    qformer = bert(modules)
    qformer.cls = None
    qformer.bert.embeddings.word_embeddings = qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    frame(model, modules, qformer)
    sizes = {"hidden_size": OPT_WIDTH, "word_embed_proj_dim": OPT_WIDTH, "ffn_dim": 24, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=32, dropout=0.0, **sizes)
    model.opt_model, model.opt_proj = OPTForCausalLM(config), nn.Linear(WIDTH, OPT_WIDTH)
    model.opt_tokenizer, model.max_txt_len, model.prompt = Tokenizer(ids, valid), T, ""
    noise(model)
    return model.eval()


def run(name: str, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Weights, losses and some gradients."""
    out = model({"image": images, "text_input": [""] * B})
    losses = {key: out[key] for key in ("loss", "loss_itc", "loss_itm", "loss_lm") if out.get(key) is not None}
    losses["loss"].backward()
    found = {f"{name}/weights/{key}": value.clone() for key, value in model.state_dict().items()}
    found |= {f"{name}/{key}": value.detach() for key, value in losses.items()}
    known = dict(model.named_parameters())
    return found | {f"{name}/grad/{key}": known[key].grad for key in GRADIENTS if key in known}


def main() -> None:
    """All tensors of the test in one file."""
    modules = lavis()
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    torch.multinomial = lambda weight, count: weight.argmax(keepdim=True)  # the hardest negative
    valid = torch.arange(T)[None] < torch.tensor([T, 4, 2, 6])[:, None]
    maker = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (B, T), generator=maker).masked_fill(~valid, PAD)
    ids[:, 0] = 1
    images = torch.randn(B, 3, PICTURE, PICTURE, generator=maker)
    found = {"ids": ids, "valid": valid, "images": images}
    found |= run("stage1", stage1(modules, ids, valid), images) | run("stage2", stage2(modules, ids, valid), images)
    torch.distributed.destroy_process_group()
    save_file({key: value.contiguous() for key, value in found.items()}, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
