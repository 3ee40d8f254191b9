"""Published folders made on disk, opened by our parts, and compared with the library that wrote them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.parity import test_beam, test_generate
from tests.parity.decoders import ids, logits
from tests.parity.noise import gap
from vlm.model.beam import Beams
from vlm.model.generate import Sampling
from vlm.model.language import Decoder
from vlm.model.published.language import language_part
from vlm.model.published.part import Part
from vlm.model.weights.files import load_strict


def part_of(folder: Path) -> Part:
    """The module that config.json describes, without its weights."""
    file = folder / "config.json"
    return language_part(json.loads(file.read_text()), str(file))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whichever of its files they are in."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: value for file in files for name, value in load_file(file).items()}


def loaded_from(folder: Path) -> Decoder:
    """Ours with the weights of a published folder."""
    part = part_of(folder)
    load_strict(part.module, part.table.to_ours(tensors(folder)), str(folder))
    assert isinstance(part.module, Decoder)
    return part.module.eval()


def changed(folder: Path, **settings: Any) -> Path:
    """The folder with other settings in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def written_back(ours: Decoder, folder: Path, into: Path) -> Path:
    """A folder with our weights as published; `folder` has the settings. The tensors must be as they were."""
    back, given = part_of(folder).table.to_theirs(ours.state_dict()), tensors(folder)
    assert set(back) == set(given)
    assert all(torch.equal(value, given[name]) for name, value in back.items())
    into.mkdir()
    (into / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(back, into / "model.safetensors", {"format": "pt"})
    return into


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    return set(first) == set(second) and all(torch.equal(value, second[name]) for name, value in first.items())


@torch.no_grad()
def padding_gap(ours: Any, vocabulary: int = 99) -> float:
    """Largest difference of rows in a padded batch, on either side, from the same rows alone."""
    rows, keep, gaps = ids() % vocabulary, (17, 9, 4), []
    for left in (True, False):
        column = torch.arange(rows.shape[1])
        valid = torch.stack([(column >= rows.shape[1] - n) if left else (column < n) for n in keep])
        batch = logits(ours, rows, valid)
        alone = [logits(ours, row[kept][None])[0] for row, kept in zip(rows, valid, strict=True)]
        gaps += [gap(found[kept], one) for found, kept, one in zip(batch, valid, alone, strict=True)]
    return max(gaps)


def same_texts(ours: Any, theirs: Any) -> bool:
    """Greedy and beam, padded prompts, an end token that comes early: `generate` writes what ours writes."""
    prompt, valid = test_generate.prompt([0, 3, 6])
    free = test_generate.written(ours, prompt, valid, test_generate.VOCABULARY - 1, Sampling(max_new=8))
    eos = free[0][4]
    sampling = Sampling(max_new=8)
    greedy = test_generate.written(ours, prompt, valid, eos, sampling)
    beams = Beams(3, max_new=8, length_penalty=0.7, returned=2)
    found = test_beam.written(ours, prompt, valid, [eos], beams)
    return greedy == test_generate.expected(theirs, prompt, valid, eos, sampling) and test_beam.same(
        found, test_beam.expected(theirs, prompt, valid, [eos], beams)
    )


def fused_experts_apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts that are one tensor in memory, expert by expert as DeepSeek's and Qwen2's files have them."""
    apart = {}
    for name, value in weights.items():
        place, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                apart[f"{place}.{e}.gate_proj.weight"], apart[f"{place}.{e}.up_proj.weight"] = gate.clone(), up.clone()
        elif part == "down_proj":
            apart |= {f"{place}.{e}.down_proj.weight": down.clone() for e, down in enumerate(value)}
        else:
            apart[name] = value
    return apart
