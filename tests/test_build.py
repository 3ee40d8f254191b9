"""Every config builds; sizes that depend on others are derived; every mix of parts takes a training step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import ITC, ITM, LANGUAGE, LM, QFORMER, TEXT, Made, settings, squares, tiny_run, write_config
from vlm import build, build_data
from vlm.config.language import TransformerLanguage
from vlm.config.load import load
from vlm.config.schema import Run
from vlm.data.text import Tokenizer, train_bpe
from vlm.model.connector import FirstToken, MeanPool, MlpConnector
from vlm.model.qformer import QFormer

ROOT = Path(__file__).parent.parent
# Those in configs/ are built in tests/config/test_configs.py.
CONFIGS = sorted((ROOT / "vlm" / "quickstart").glob("*.yaml"))
SMALL = [*CONFIGS, *sorted((ROOT / "configs" / "tiny").glob("*.yaml"))]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a red square", "a blue square"], 300)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_builds(path: Path, tokenizer: Tokenizer) -> None:
    run = load(Run, path)
    with torch.device("meta"):  # shapes only: no memory, no download
        model = build.model(run, tokenizer)
    if run.model.vision is not None:
        assert model.vision.dim > 0
        assert model.vision.transform.size == (run.model.vision.image_size,) * 2
    assert all(parameter.is_meta for parameter in model.parameters())
    for loss in run.losses:
        assert {"itc": model.contrast, "itm": model.match, "lm": model}[loss.kind] is not None


READERS = [path for path in SMALL if isinstance(load(Run, path).model.language, TransformerLanguage)]


@pytest.mark.parametrize("path", READERS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("mixer", ["attention", "retention"])
@pytest.mark.parametrize("ffn", ["gated_mlp", "moe"])
def test_every_decoder_takes_every_mixer_and_ffn(path: Path, mixer: str, ffn: str, tokenizer: Tokenizer) -> None:
    choice = [f"model.language.mixer.kind={mixer}", f"model.language.ffn.kind={ffn}"]
    with torch.device("meta"):
        language = build.model(load(Run, path, choice), tokenizer).language
    kinds = {type(block.mixer).__name__ for block in language.stack.blocks}
    assert kinds == {"attention": {"Attention"}, "retention": {"Retention"}}[mixer]
    kinds = {type(block.ffn).__name__ for block in language.stack.blocks}
    assert {"gated_mlp": "GatedMlp", "moe": "MixtureOfExperts"}[ffn] in kinds


@pytest.mark.parametrize(
    "choice",
    [
        ["model.language.mixer.kind=retention"],
        ["model.language.ffn.kind=moe", "model.language.ffn.bias_rate=0.01"],
        ["model.language.mixer={max_positions: 64, head_norm: true, bias: true}", "model.language.placement=post"],
        ["model.language.mixer={window: 4}", "model.language.norm=layer"],
    ],
    ids=["retention", "moe", "learned positions", "window"],
)
def test_a_decoder_of_any_kind_learns(tmp_path: Path, choice: list[str]) -> None:
    made = Made(tiny_run(tmp_path, "decoder", "train.params.0.lr=0.01", *choice))
    batch = made.batch("a red square", "a green square")
    losses = [made.step([batch], 1.0)[0] for _ in range(12)]
    assert losses[-1]["lm"] < 0.8 * losses[0]["lm"]
    assert ("balance" in losses[0]) == ("ffn.kind=moe" in choice[0])


def built(tmp_path: Path, kind: str, *overrides: str) -> Any:
    return Made(tiny_run(tmp_path, kind, *overrides)).model


def test_sizes_come_from_the_parts(tmp_path: Path) -> None:
    clip = built(tmp_path, "clip")
    assert (clip.vision.dim, clip.vision.tokens) == (16, 5)
    assert (clip.contrast.image.in_features, clip.contrast.text.in_features, clip.contrast.dim) == (16, 24, 16)
    mlp = built(tmp_path, "decoder")
    assert [layer.in_features for layer in mlp.connector.layers[::2]] == [16, 24]
    assert (mlp.connector.dim, mlp.image_tokens) == (24, 5)
    dropped = built(tmp_path, "decoder", "model.vision.class_token=drop", "model.vision.image_size=64")
    assert dropped.image_tokens == 16
    qformer = built(tmp_path, "qformer", "model.connector.dim=32")
    assert (qformer.contrast.image.in_features, qformer.contrast.text.in_features) == (32, 32)
    assert (qformer.match.classify.in_features, qformer.image_tokens) == (32, 0)
    assert qformer.connector.text.position.num_embeddings == 12  # data.max_tokens


def test_a_qformer_before_a_language_model_matches_at_its_own_width(tmp_path: Path) -> None:
    language = "{kind: transformer, dim: 48, layers: 1, heads: 2}"
    both = built(tmp_path, "qformer", f"model.language={language}")
    assert (both.connector.width, both.connector.dim, both.image_tokens) == (16, 48, 2)
    assert (both.match.classify.in_features, both.contrast.image.in_features) == (16, 48)


def test_equal_settings_give_equal_weights(tmp_path: Path) -> None:
    first, second = (built(tmp_path, "qformer").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = built(tmp_path, "qformer", "train.seed=1").state_dict()
    assert not torch.equal(first["connector.queries"], other["connector.queries"])


@pytest.mark.parametrize(
    ("connector", "kind"),
    [
        ({"kind": "linear"}, MlpConnector),
        ({"kind": "mlp", "depth": 3, "hidden": 20}, MlpConnector),
        ({"kind": "mean"}, MeanPool),
        ({"kind": "first"}, FirstToken),
        (QFORMER, QFormer),
    ],
)
def test_the_kind_decides(tmp_path: Path, connector: dict[str, Any], kind: type) -> None:
    given = settings("clip", squares(tmp_path / "squares.tar"))
    given["model"]["connector"] = connector
    made = Made(load(Run, write_config(tmp_path / "run.yaml", given)))
    assert type(made.model.connector) is kind


SILENT = {**QFORMER, "text": False}
MLP = {"kind": "mlp", "depth": 2}
MIXES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "linear + decoder": ({"connector": {"kind": "linear"}, "language": LANGUAGE}, [LM]),
    "mlp + decoder": ({"connector": MLP, "language": LANGUAGE}, [LM]),
    "mlp + decoder + text": ({"connector": MLP, "language": LANGUAGE, "text": TEXT}, [ITC, LM]),
    "linear + text": ({"connector": {"kind": "linear"}, "text": TEXT}, [ITC]),
    "mlp + text": ({"connector": MLP, "text": TEXT}, [ITC]),
    "mean + text": ({"connector": {"kind": "mean"}, "text": TEXT}, [ITC]),
    "first + text": ({"connector": {"kind": "first"}, "text": TEXT}, [ITC]),
    "qformer": ({"connector": QFORMER}, [ITC, ITM, LM]),
    "qformer + decoder": ({"connector": QFORMER, "language": LANGUAGE}, [ITC, ITM, LM]),
    "qformer + text": ({"connector": SILENT, "text": TEXT}, [ITC]),
    "silent qformer + decoder": ({"connector": SILENT, "language": LANGUAGE}, [LM]),
    "silent qformer + decoder + text": ({"connector": SILENT, "language": LANGUAGE, "text": TEXT}, [ITC, LM]),
    "untied, grouped": ({"connector": MLP, "language": {**LANGUAGE, "tied": False, "mixer": {"kv_heads": 1}}}, [LM]),
}


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_takes_a_training_step(tmp_path: Path, mix: str) -> None:
    model, losses = MIXES[mix]
    given = settings("clip", squares(tmp_path / "squares.tar", 8), batch_size=8)
    given["model"] = {"vision": given["model"]["vision"], "embed_dim": 16, **model}
    given["losses"] = losses
    made = Made(load(Run, write_config(tmp_path / "run.yaml", given)))
    batch = next(made.loader.train([0])).to("cpu")
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    first, norm = made.step([batch], 1.0)
    assert set(first) == {loss["kind"] for loss in losses}
    assert 0 < norm < float("inf")
    moved = {name.split(".")[0] for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name.split(".")[0] for name in before}  # every part learns something
    for _ in range(4):
        last, _ = made.step([batch], 1.0)
    assert sum(last.values()) < sum(first.values())


def test_open_clip_and_frozen_bf16(tmp_path: Path) -> None:
    given = settings("decoder", squares(tmp_path / "squares.tar"))
    vision = {"kind": "open_clip", "name": "ViT-S-32", "image_size": 32, "layer": -2, "class_token": "drop"}
    given["model"]["vision"] = {**vision, "dtype": "bfloat16"}
    run = load(Run, write_config(tmp_path / "run.yaml", given))
    with torch.device("meta"):
        model = build.model(run, train_bpe(["a"], 300))
    assert (model.vision.tokens, model.vision.dim, model.vision.frozen) == (1, 384, True)
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.bfloat16}


def test_tokenizers(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "clip")
    learned = build_data.tokenizer(run.tokenizer, ["a red square"])
    learned.save(tmp_path / "tokenizer.json")

    def unread() -> Any:
        raise AssertionError("captions are read only to learn a tokenizer")
        yield

    path = tmp_path / "tokenizer.json"
    file = tiny_run(tmp_path, "clip", f"tokenizer={{kind: file, path: {path}}}")
    assert build_data.tokenizer(file.tokenizer, unread()).encode("a red square") == learned.encode("a red square")
    assert build_data.tokenizer(tiny_run(tmp_path, "clip", "tokenizer.kind=clip").tokenizer, unread()).size == 49408


def test_precision(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert build.precision(tiny_run(tmp_path, "clip"), cpu) is torch.float32
    assert build.precision(tiny_run(tmp_path, "clip", "train.precision=bfloat16"), cpu) is torch.bfloat16
    assert build.precision(tiny_run(tmp_path, "clip", "train.precision=auto"), cpu) in (torch.float32, torch.bfloat16)
