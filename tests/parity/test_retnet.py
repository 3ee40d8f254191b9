"""Our RetNet is torchscale's in all forms, and our retention is fla's naive one: against outputs kept in golden/.

golden/retnet.py says how they were made and why they are kept.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity.decoder_folders import loaded_from, padding_gap
from tests.parity.golden.retnet import SIZES
from tests.parity.noise import gap
from vlm.model.language import Decoder
from vlm.model.retnet import retnet
from vlm.model.weights.files import load_strict
from vlm.model.weights.retnet import retnet_table
from vlm.nn.retain import Chunkwise, parallel, recurrent
from vlm.nn.retention import Decay, Form
from vlm.nn.tokens import Tokens

GOLDEN = load_file(Path(__file__).parent / "golden" / "retnet.safetensors")
DEVIATION = {"large": 0.3, "small": 0.02}
FORMS = {"parallel": parallel, "recurrent": recurrent, "chunkwise 4": Chunkwise(4), "chunkwise 7": Chunkwise(7)}


def published(size: str) -> dict[str, Tensor]:
    weights = {key.removeprefix("weights/"): value for key, value in GOLDEN.items() if key.startswith("weights/")}
    return {
        key: value * DEVIATION[size] if value.ndim > 1 and "rel_pos" not in key else value
        for key, value in weights.items()
    }


def ours(size: str, form: Form | None = None, **changes: object) -> Decoder:
    sizes = {"vocabulary": 61, "dim": 32, "layers": 2, "heads": 4, "hidden": 48}
    model = retnet(**{**sizes, **changes}).eval()  # type: ignore[arg-type]
    load_strict(model, retnet_table().to_ours(published(size)), "torchscale")
    if form is not None:
        for block in model.stack.blocks:
            block.mixer.form = form  # type: ignore[union-attr]
    return model


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    return model.logits(model(Tokens.of(model.embed(GOLDEN["ids"]))).hidden)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("theirs", ["parallel", "recurrent", "chunkwise"])
def test_all_forms_for_large_weights(form: str, theirs: str) -> None:
    assert gap(logits(ours("large", FORMS[form])), GOLDEN[f"large/{theirs}"]) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_all_our_forms_are_the_published_parallel_one_for_small_weights(form: str) -> None:
    """Their own chunkwise form is far off here: its row scales meet the norm's eps otherwise."""
    found = logits(ours("small", FORMS[form]))
    assert gap(found, GOLDEN["small/parallel"]) < 1e-6
    assert gap(GOLDEN["small/chunkwise"], GOLDEN["small/parallel"]) > 1e-2


@torch.no_grad()
def test_prefill_then_token_by_token() -> None:
    model, ids = ours("large"), GOLDEN["ids"]
    out = model(Tokens.of(model.embed(ids[:, :9])))
    parts = [out.hidden]
    for t in range(9, ids.shape[1]):
        tokens = Tokens.of(model.embed(ids[:, t : t + 1]), position=out.state.position[:, None])
        out = model(tokens, out.state)
        parts.append(out.hidden)
    assert gap(model.logits(torch.cat(parts, 1)), GOLDEN["large/parallel"]) < 1e-4


def test_round_trip() -> None:
    back, given = retnet_table().to_theirs(ours("large").state_dict()), published("large")
    for name, value in back.items():
        assert torch.equal(value, given.pop(name)), name
    assert all("rel_pos" in name for name in given)


def from_folder(folder: Path, **arguments: object) -> Decoder:
    """From a file of torchscale's tensors and the arguments of its configuration."""
    save_file(published("large"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SIZES, **arguments}))
    return loaded_from(folder)


def test_from_disk(tmp_path: Path) -> None:
    model = from_folder(tmp_path)
    assert gap(logits(model), GOLDEN["large/parallel"]) < 1e-4
    assert padding_gap(model, SIZES["vocab_size"]) < 1e-4


@pytest.mark.parametrize("argument", [{"layernorm_eps": 1e-1}, {"activation_fn": "swish"}])
def test_another_argument_is_noticed(argument: dict[str, object], tmp_path: Path) -> None:
    assert gap(logits(from_folder(tmp_path, **argument)), GOLDEN["large/parallel"]) > 1e-3


@pytest.mark.parametrize("change", [{"schedule": "geometric"}, {"eps": 1e-1}])
def test_a_changed_fact_is_noticed(change: dict[str, object]) -> None:
    assert gap(logits(ours("large", **change)), GOLDEN["large/parallel"]) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_retention_is_fla_s_up_to_the_scale_of_rows(form: str) -> None:
    """fla has no score normalisation, which scales whole rows: directions agree, and so do outputs after a norm."""
    q, k, v, expected = (GOLDEN[f"fla/{name}"].transpose(1, 2) for name in ("q", "k", "v", "out"))
    # No rotation in theirs: all at position 0.
    tokens = Tokens.of(torch.zeros(*q.shape[:2], 1), position=torch.zeros(q.shape[:2], dtype=torch.long))
    found = FORMS[form](q, k, v, Decay(q.shape[2], q.shape[3])(tokens)).out
    ratio = found / expected
    assert gap(ratio, ratio[..., :1].expand_as(ratio)) < 1e-3
    assert gap(_unit(found), _unit(expected)) < 1e-5
    assert gap(_unit(found.roll(1, 1)), _unit(expected)) > 0.1


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-12)
