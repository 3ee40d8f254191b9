"""Our BLIP-2 is LAVIS' own, in its first stage and before OPT: against losses and gradients kept in golden/.

golden/blip2.py says how they were made and why they are kept.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.blip2 import run
from tests.parity.noise import gap
from tests.parity.test_stage1_losses import hardest as hardest  # both sides take the hardest negative
from vlm.data.batch import Batch, Text
from vlm.model.published import lavis
from vlm.model.published.lavis import lavis_language, lavis_system, together
from vlm.model.vlm import VisionLanguageModel
from vlm.model.weights.files import load_strict, read
from vlm.nn.tokens import IGNORE, IMAGE_ID
from vlm.train.task import Itc, Itm, Lm, Losses, Task

GOLDEN = load_file(Path(__file__).parent / "golden" / "blip2.safetensors")
VOCABULARY, QUERIES, DEC, BATCH = 40, 3, 2, 4
OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
OURS = {
    "query_tokens": "connector.queries",
    "ln_vision.weight": "connector.image_norm.weight",
    "Qformer.bert.embeddings.word_embeddings.weight": "connector.text.embedding.weight",
    "opt_proj.weight": "connector.out.weight",
}


@pytest.fixture(autouse=True)
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of the Q-Former, two of the tower."""
    monkeypatch.setattr(lavis, "HEAD", 6)
    monkeypatch.setattr(lavis, "EVA_HEAD", 10)


def kept(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


def files(stage: str, folder: Path) -> dict[str, Path]:
    """As LAVIS leaves them: what it trained in a .pth, the image encoder beside it."""
    weights = kept(f"{stage}/weights/")
    tower = {k.removeprefix("visual_encoder."): v for k, v in weights.items() if k.startswith("visual_encoder.")}
    trained = {k: v for k, v in weights.items() if not k.startswith(("visual_encoder.", "opt_model."))}
    paths = {"main": folder / "blip2.pth", "vision": folder / "eva_vit_g.pth"}
    torch.save({"model": trained}, paths["main"])
    torch.save(tower, paths["vision"])
    return paths


def opened(stage: str, folder: Path) -> VisionLanguageModel:
    found = {name: read(path) for name, path in files(stage, folder).items()}
    main, others = found["main"], {"vision": found["vision"]}
    language = None
    if stage == "stage2":
        language = lavis_language(OPT, "config.json")
        found["language"] = kept("stage2/weights/opt_model.")
    system = lavis_system("blip2.pth", main, others, language)
    load_strict(system.module, system.table.to_ours(together(found)), "LAVIS")
    return system.module.eval()


def batch() -> Batch:
    ids, valid = GOLDEN["ids"], GOLDEN["valid"]
    labels = ids.masked_fill(~valid, IGNORE)
    labels[:, 0] = IGNORE
    names = [str(i) for i in range(BATCH)]
    return Batch(
        keys=names,
        images=GOLDEN["images"],
        image_ids=names,
        owner=torch.arange(BATCH),
        strings=names,
        captions=Text(ids, valid, labels),
        prompts=None,
        positive=torch.eye(BATCH, dtype=torch.bool),
    )


def stage1(model: VisionLanguageModel, smoothing: float = 0.1) -> Losses:
    return Task(model, [Itc(label_smoothing=smoothing), Itm(), Lm(VOCABULARY, DEC, label_smoothing=smoothing)])(batch())


def stage2(model: VisionLanguageModel) -> Tensor:
    """All words are learned there, also the first, the start token after the queries."""
    ids, valid = GOLDEN["ids"], GOLDEN["valid"]
    queries = torch.full((BATCH, QUERIES), IMAGE_ID)
    labels = torch.cat([queries.fill_(IGNORE), ids.masked_fill(~valid, IGNORE)], 1)
    given = torch.cat([torch.full_like(queries, IMAGE_ID), ids], 1)
    text = Text(given, torch.cat([torch.ones_like(queries, dtype=torch.bool), valid], 1), labels)
    return run(model, GOLDEN["images"], text)[1]


def check_gradients(model: VisionLanguageModel, wanted: Mapping[str, Tensor]) -> None:
    for name, grad in wanted.items():
        if name == "temp":  # d/dτ = d/d(log 1/τ) · −1/τ
            assert model.contrast is not None and model.contrast.log_scale.grad is not None
            found = -model.contrast.log_scale.grad / GOLDEN["stage1/weights/temp"]
        else:
            own = model.get_parameter(OURS[name]).grad
            assert own is not None
            found = own
        assert float(grad.abs().max()) > 1e-2, name
        assert gap(found, grad.reshape(found.shape)) < 1e-4, name


def test_the_first_stage(tmp_path: Path) -> None:
    model = opened("stage1", tmp_path)
    losses = stage1(model)
    for name in ("itc", "itm", "lm"):
        assert gap(losses.each[name], GOLDEN[f"stage1/loss_{name}"]) < 1e-5
    losses.total.backward()
    wanted = kept("stage1/grad/")
    assert set(wanted) == {*OURS, "temp"} - {"opt_proj.weight"}
    check_gradients(model, wanted)


def test_the_second_stage(tmp_path: Path) -> None:
    model = opened("stage2", tmp_path)
    loss = stage2(model)
    assert gap(loss, GOLDEN["stage2/loss"]) < 1e-5
    loss.backward()
    wanted = kept("stage2/grad/")
    assert set(wanted) == {"query_tokens", "ln_vision.weight", "opt_proj.weight"}
    check_gradients(model, wanted)


@torch.no_grad()
def test_changed_facts_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = stage1(opened("stage1", tmp_path), smoothing=0.0)
    assert all(gap(plain.each[name], GOLDEN[f"stage1/loss_{name}"]) > 1e-3 for name in ("itc", "lm"))
    monkeypatch.setattr(lavis, "HEAD", 12)
    assert gap(stage1(opened("stage1", tmp_path)).each["itm"], GOLDEN["stage1/loss_itm"]) > 1e-3
    monkeypatch.setattr(lavis, "HEAD", 6)
    monkeypatch.setattr(lavis, "EVA_HEAD", 20)
    assert gap(stage2(opened("stage2", tmp_path)), GOLDEN["stage2/loss"]) > 1e-3
