"""Adapters: where they go and where not, that they start as nothing, what they compute, and merged the same."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.model import small
from vlm.model.connector import MlpConnector
from vlm.model.generate import Sampling, generate
from vlm.model.language import llama, mixtral
from vlm.model.lora import Lora, about, add_lora, merge_lora
from vlm.model.vision import ImageEncoder, open_clip_encoder, timm_encoder
from vlm.model.vlm import VisionLanguageModel
from vlm.nn.adapter import adapters, is_adapter
from vlm.nn.layout import lay_out_for_decoding

EVERYWHERE = [
    Lora(r"language\..*\.(query|value)", rank=3, alpha=6.0),
    Lora(r"language\..*\.(gate|down)", rank=5, alpha=2.5, dropout=0.5),
    Lora(r"connector\.layers\.\d+", rank=2),
]
VIT = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}


def spread(model: nn.Module) -> None:
    """Adapters that do something."""
    maker = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=maker) * 0.3


def logits(model: VisionLanguageModel) -> Tensor:
    text = small.words(model, [5, 9])
    return model.logits(model.write(model.see(small.pictures()), text).hidden)


def seeing(frozen: bool = True, dtype: torch.dtype | None = None) -> VisionLanguageModel:
    vision = timm_encoder("vit_tiny_patch16_224", image_size=32, args=VIT, frozen=frozen, dtype=dtype)
    language = llama(small.VOCABULARY, small.WIDTH, layers=2, heads=4)
    return VisionLanguageModel(vision, MlpConnector(16, small.WIDTH, 5), language=language)


def mistakes(model: nn.Module, *specs: Lora) -> list[str]:
    """The lines of the refusal, which must leave the model as it was."""
    names = [name for name, _ in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError) as caught:
        add_lora(model, specs)
    assert [name for name, _ in model.named_modules()] == names
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    return str(caught.value).splitlines()


def test_adapters_start_as_nothing_and_only_they_learn() -> None:
    model = small.llava()
    model.language.embedding.requires_grad_(False)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft has some for models that hold adapters already
        names = add_lora(model, EVERYWHERE)
    assert len(names) == 2 * 2 + 2 * 2 + 2
    assert torch.equal(logits(model), before)
    logits(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        base = ".base_layer." in name
        learns = not base and name != "language.embedding.weight"
        assert parameter.requires_grad == learns, name
        assert (parameter.grad is not None) == learns, name
    assert not hasattr(model, "peft_config")
    ups = [parameter.grad for name, parameter in model.named_parameters() if ".lora_B." in name]
    assert all(float(gradient.abs().max()) > 0 for gradient in ups)


def test_names_ranks_and_scales() -> None:
    model = small.llava()
    add_lora(model, EVERYWHERE)
    assert {(name.rpartition(".")[2], len(own.down.weight), own.scale) for name, own in adapters(model).items()} == {
        ("query", 3, 2.0),
        ("value", 3, 2.0),
        ("gate", 5, 0.5),
        ("down", 5, 0.5),
        ("0", 2, 8.0),
        ("2", 2, 8.0),
    }
    block = {name for name in model.state_dict() if name.startswith("language.stack.blocks.1.mixer.query")}
    stem = "language.stack.blocks.1.mixer.query"
    assert block == {f"{stem}.base_layer.weight", f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight"}
    assert about(model, list(adapters(model)))[:2] == [
        "adapter of rank 2: connector.layers.N (2)",
        "adapter of rank 3: language.stack.blocks.N.mixer.query (2)",
    ]


def test_by_hand() -> None:
    model = small.llava()
    add_lora(model, EVERYWHERE)
    spread(model)
    x = torch.randn(2, 5, small.WIDTH)
    for name, own in adapters(model).items():
        if "mixer" in name:
            layer = model.get_submodule(name)
            expected = x @ own.base.weight.T + 6.0 / 3 * (x @ own.down.weight.T @ own.up.weight.T)
            torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_merged_is_unmerged() -> None:
    model = small.llava()
    names = {name: value.shape for name, value in model.state_dict().items()}
    plain = logits(model)
    add_lora(model, EVERYWHERE)
    spread(model)
    expected = logits(model)
    assert float((expected - plain).detach().abs().max()) > 0.1
    assert len(merge_lora(model)) == 10
    assert {name: value.shape for name, value in model.state_dict().items()} == names
    assert all(type(model.get_submodule(name)) is nn.Linear for name in names if name.endswith("query"))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert merge_lora(model) == []


def test_a_change_is_the_product_to_the_last_bit_of_fp32() -> None:
    model = small.llava()
    add_lora(model, EVERYWHERE)
    spread(model)
    for own in adapters(model).values():
        exact = own.scale * (own.up.weight.double() @ own.down.weight.double())
        torch.testing.assert_close(own.change().double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spec", [r"language\..*\.(query|value)", r"language\..*\.(query|key|value|gate|up)"])
def test_the_fused_reading_of_a_decoder_sees_them(spec: str) -> None:
    """Layers that read the same input, some of them with adapters, laid out for decoding."""
    model = small.llava()
    add_lora(model, [Lora(spec)])
    spread(model)
    expected = logits(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
        lay_out_for_decoding(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
        merge_lora(model)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_vocabulary_head_takes_one() -> None:
    language = llama(small.VOCABULARY, small.WIDTH, layers=1, heads=4, tied=False)
    add_lora(language, [Lora("head")])
    hidden = torch.randn(3, small.WIDTH)
    before = language.logits(hidden)
    spread(language)
    own = adapters(language)["head"]
    expected = before + 2 * (hidden @ own.down.weight.T @ own.up.weight.T)
    torch.testing.assert_close(language.logits(hidden), expected, atol=1e-5, rtol=1e-5)


def test_a_qformer_takes_them() -> None:
    model = small.blip2()
    add_lora(model, [Lora(r"connector\..*\.cross\.attention\.(query|value)"), Lora(r"connector\..*routes\.text\.up")])
    spread(model)
    text = small.words(model, [4, 7])
    seen = model.see(small.pictures())
    expected = model.match_logits(seen, text)
    expected.sum().backward()
    assert all(own.up.weight.grad is not None for own in adapters(model).values())
    merge_lora(model)
    torch.testing.assert_close(model.match_logits(model.see(small.pictures()), text), expected, atol=1e-5, rtol=1e-5)


def test_generation() -> None:
    model = small.llava()
    add_lora(model, EVERYWHERE)
    plain = written(model)
    spread(model)
    changed = written(model)
    assert changed != plain
    merge_lora(model)
    assert written(model) == changed


def written(model: VisionLanguageModel) -> list[list[int]]:
    prompt = small.words(model, [3, 5], side="left")
    with torch.no_grad():
        out = model.write(model.see(small.pictures()), prompt)
        return generate(model.proceed, model.logits(out.hidden[:, -1]), out.state, prompt.ids, 0, Sampling(max_new=8))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_encoder_learns_by_its_adapters(dtype: torch.dtype | None) -> None:
    model = seeing(dtype=dtype)
    vision = model.vision
    assert isinstance(vision, ImageEncoder)
    pixels = torch.randn(2, 3, 32, 32)
    before = vision(pixels)
    assert not before.requires_grad
    names = add_lora(model, [Lora(r"vision\..*attn\.(qkv|proj)", dropout=0.5)])
    assert len(names) == 4 and torch.equal(vision(pixels), before)
    model.train()
    kinds = {type(part).__name__ for part in vision.modules() if part.training}
    assert kinds == {"Dropout"}
    spread(model)
    assert not torch.equal(vision(pixels), vision(pixels))
    model.eval()
    assert torch.equal(vision(pixels), vision(pixels))
    vision(pixels).float().square().mean().backward()
    for name, parameter in vision.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name)
        assert parameter.dtype == (torch.float32 if is_adapter(name) or dtype is None else dtype)
    with torch.no_grad():
        assert not vision(pixels).requires_grad
    model.requires_grad_(False)
    assert not vision(pixels).requires_grad


def test_recomputation_in_a_frozen_encoder_gives_the_same_gradients() -> None:
    model = seeing()
    assert isinstance(model.vision, ImageEncoder)
    add_lora(model, [Lora(r"vision\..*attn\.qkv")])
    spread(model)
    pixels = torch.randn(2, 3, 32, 32)
    found = []
    for _ in range(2):
        model.zero_grad()
        model.vision(pixels).square().mean().backward()
        found.append([own.down.weight.grad.clone() for own in adapters(model).values()])  # type: ignore[union-attr]
        model.vision.recompute()
    assert all(float(first.abs().max()) > 0 and torch.equal(first, again) for first, again in zip(*found, strict=True))


def test_patterns_that_match_nothing() -> None:
    model = small.llava()
    lines = mistakes(model, Lora(r"language\..*\.qery"), Lora("langage.stack.blocks.1.mixer.query"), Lora("zz"))
    near = "language.stack.blocks.N.mixer.query"
    assert lines[0].startswith(r"model.lora.0: 'language\..*\.qery' matches nothing; linear layers are: ")
    assert (
        lines[1].startswith("model.lora.1: 'langage.stack.blocks.1.mixer.query' matches nothing; ") and near in lines[1]
    )
    assert lines[2] == (
        "model.lora.2: 'zz' matches nothing; linear layers are: connector.layers.N, "
        "language.stack.blocks.N.mixer.query, language.stack.blocks.N.mixer.key, language.stack.blocks.N.mixer.value, "
        "language.stack.blocks.N.mixer.out, language.stack.blocks.N.ffn.gate, …"
    )


def test_every_mistake_at_once() -> None:
    model = seeing()
    found = mistakes(
        model,
        Lora("("),
        Lora(r"language\..*\.query"),
        Lora(r"language.*1.mixer.query"),
        Lora(r"language\.embedding|language\.stack\.norm"),
        Lora(r".*\.(fc1|key)"),
        Lora(r".*\.fc2"),
        Lora(r"language\..*\.down", rank=25),
        Lora(r"connector\.layers"),
    )
    assert found == [
        "model.lora.0: '(' is not a regular expression (missing ), unterminated subpattern at position 0)",
        "model.lora.2: 'language.*1.mixer.query' matches nothing that an earlier pattern left over",
        r"model.lora.3: 'language\.embedding|language\.stack\.norm' matches more than linear layers: "
        "language.embedding (Embedding), language.stack.norm (RMSNorm); end it with the names of linear layers",
        r"model.lora.4: '.*\.(fc1|key)' reaches into the frozen vision (vision.backbone.model.blocks.N.mlp.fc1) as "
        "well as language.stack.blocks.N.mixer.key; a pattern that means it begins with 'vision' and matches nothing "
        "else",
        r"model.lora.5: '.*\.fc2' reaches into the frozen vision (vision.backbone.model.blocks.N.mlp.fc2); a pattern "
        "that means it begins with 'vision' and matches nothing else",
        r"model.lora.6: 'language\..*\.down' has rank=25, more than the 24 that language.stack.blocks.0.ffn.down is "
        "wide",
        r"model.lora.7: 'connector\.layers' matches more than linear layers: connector.layers (Sequential); end it "
        "with the names of linear layers",
    ]


@pytest.mark.parametrize("pattern", ["vision.*fc1|language.*key", ".*", "(vision|language).*(fc1|key)"])
def test_a_pattern_that_leaks_into_the_frozen_encoder(pattern: str) -> None:
    assert any("reaches into the frozen vision" in line for line in mistakes(seeing(), Lora(pattern)))


def test_an_encoder_that_learns_is_a_part_as_any_other() -> None:
    assert len(add_lora(seeing(frozen=False), [Lora(r".*\.(fc1|key)")])) == 4


def test_fused_experts_are_refused_in_words() -> None:
    language = mixtral(small.VOCABULARY, small.WIDTH, layers=1, heads=4, kv_heads=2, hidden=16, experts=2)
    assert mistakes(language, Lora(r".*\.(gate|down)")) == [
        r"model.lora.0: '.*\.(gate|down)' matches more than linear layers: stack.blocks.N.ffn.down (a tensor of "
        "MixtureOfExperts, which has no linear layers); end it with the names of linear layers"
    ]


@pytest.mark.parametrize("name", ["in_proj_weight", "out_proj"])
def test_fused_attention_of_open_clip_is_refused_in_words(name: str, tmp_path: Path) -> None:
    model = VisionLanguageModel(clip())
    (line,) = mistakes(model, Lora(rf"vision\..*\.attn\.{name}"))
    assert re.search(rf"attn\.{name} \(.*MultiheadAttention", line)
    (line,) = mistakes(model, Lora(r"vision\..*\.attn"))
    assert "torch's MultiheadAttention reads its fused matrices itself" in line
    assert len(add_lora(model, [Lora(r"vision\..*\.c_fc")])) == 12


def clip(layer: int = -1) -> ImageEncoder:
    with torch.device("meta"):
        return open_clip_encoder("ViT-B-32", image_size=64, frozen=True, layer=layer)


def test_layers_that_never_run_are_refused() -> None:
    """LLaVA takes the output of the last block but one: adapters in the last one would learn nothing, in silence."""
    model = VisionLanguageModel(clip(layer=-2))
    (line,) = mistakes(model, Lora(r"vision\..*\.11\.mlp\.c_fc"))
    assert line.startswith("model.lora: vision.backbone.visual.transformer.resblocks.N.mlp.c_fc")
    assert "never run as layers (they come after model.vision.layer, or" in line
    assert len(add_lora(model, [Lora(r"vision\..*\.10\.mlp\.c_fc")])) == 1


def test_layers_whose_weights_an_encoder_reads_itself_are_refused() -> None:
    model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    encoder = timm_encoder(
        "beit_base_patch16_224", image_size=32, args={"embed_dim": 16, "depth": 1, "num_heads": 2}, frozen=True
    )
    (line,) = mistakes(VisionLanguageModel(encoder), Lora(r"vision\..*\.qkv"))
    assert "the encoder reads their weights itself" in line


def test_a_second_adapter_on_a_layer_is_refused() -> None:
    model = small.llava()
    add_lora(model, [Lora(r"language\..*\.query")])
    (line,) = mistakes(model, Lora(r"language\..*\.(query|key)"))
    assert "language.stack.blocks.N.mixer.query (has one already)" in line
    assert len(add_lora(model, [Lora(r"language\..*\.key")])) == 2
    assert len(adapters(model)) == 4


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert mistakes(small.llava(), Lora(r"language\..*\.query")) == [
        "adapters (model.lora) need peft: pip install 'vlm[lora]'"
    ]
    assert add_lora(small.llava(), []) == []


def test_names_are_whole_names() -> None:
    """peft takes a list of names for ends of names: `head` would be `language.head` too."""
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "a": nn.ModuleDict({"head": nn.Linear(4, 4)})})
    assert add_lora(model, [Lora("head", rank=2)]) == ["head"]
    assert list(adapters(model)) == ["head"]
