"""Features in place of pictures: the same losses, stale ones refused, and nothing that would make them wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.command import Commands
from tests.tiny import read, records, settings, squares, write_config
from vlm.config.load import ConfigError
from vlm.data.features import FeatureInfo, FeatureShards, open_features
from vlm.data.image import BadSample
from vlm.eval.run import retrieval
from vlm.restore import restore
from vlm.train.features import features
from vlm.train.run import train_run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose encoder others freeze."""
    folder = tmp_path_factory.mktemp("encoder")
    given = settings("clip", squares(folder / "squares.tar"), steps=2)
    train_run(read(write_config(folder / "clip.yaml", given)), folder / "clip")
    return folder


def frozen(folder: Path, kind: str, *overrides: str) -> Path:
    given = settings(kind, folder / "squares.tar", steps=4)
    given["model"]["vision"] = given["model"]["vision"] | {"frozen": True}
    given["model"]["init"] = {"vision": str(folder / "clip")}
    given["data"]["val"] = str(folder / "squares.tar")
    return write_config(folder / f"{kind}-frozen.yaml", given)


@pytest.mark.parametrize("kind", ["qformer", "decoder"])
def test_training_from_features_gives_the_same_losses(encoder: Path, kind: str, tmp_path: Path) -> None:
    config = frozen(encoder, kind)
    features(config, [], tmp_path / "kept", "float32")
    train_run(read(config), tmp_path / "pictures")
    names = [f"data.train={tmp_path / 'kept' / 'train'}", f"data.val={tmp_path / 'kept' / 'val'}"]
    train_run(read(config, *names), tmp_path / "features")
    both = [records(tmp_path / name) for name in ("pictures", "features")]
    assert len(both[0]) >= 5
    for theirs, mine in zip(*both, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    half = tmp_path / "half"
    features(config, [], half)
    train_run(read(config, f"data.train={half / 'train'}"), tmp_path / "float16")
    last = records(tmp_path / "float16")[-1]
    assert last["val/loss_lm"] == pytest.approx(both[0][-1]["val/loss_lm"], rel=1e-2)
    if kind == "qformer":
        runs = (
            retrieval(restore(tmp_path / "features"), [name]) for name in (str(encoder / "squares.tar"), names[0][11:])
        )
        assert next(runs)["retrieval"] == next(runs)["retrieval"]


def test_the_command_tells_the_room_first_and_the_counts_last(vlm: Commands, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    done = vlm(
        "shards",
        "features",
        str(frozen(encoder, "decoder")),
        str(out),
        "--dtype",
        "bfloat16",
        "data.val=null",
        folder=tmp_path,
    )
    assert done.code == 0, done.err
    assert "of bfloat16: 0.2 KiB a picture, 0.0 MiB for 16 pictures" in done.err
    assert json.loads(done.out)["train"]["samples"] == 16
    assert {file.name for file in (out / "train").iterdir()} == {"000000.tar", "index.json", "sizes.json"}
    assert not (out / "val").exists()
    again = vlm("shards", "features", str(frozen(encoder, "decoder")), str(out), "data.val=null", folder=tmp_path)
    assert again.code == 2 and "--overwrite" in again.err
    shards = open_features(str(out / "train"))
    assert isinstance(shards, FeatureShards)
    assert shards.info.read(shards.raw(3).image).shape == (shards.info.tokens, shards.info.dim)
    assert shards.raw(3).captions == ["a yellow square"]


def test_features_of_another_encoder_are_refused(encoder: Path, tmp_path: Path) -> None:
    config = frozen(encoder, "decoder")
    features(config, ["data.val=null"], tmp_path / "kept")
    source = f"data.train={tmp_path / 'kept' / 'train'}"
    other = read(write_config(encoder / "other.yaml", settings("clip", encoder / "squares.tar", steps=3)))
    if not (encoder / "other").exists():
        train_run(other, encoder / "other")
    with pytest.raises(ValueError, match=r"stale \(weights: [0-9a-f]{64}, now [0-9a-f]{64}\); write them anew"):
        train_run(read(config, source, f"model.init.vision={encoder / 'other'}"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"stale .*tokens: 5, now 4.*encoder: "):
        train_run(read(config, source, "model.vision.class_token=drop"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.augment: it changes pictures"):
        train_run(read(config, source, "data.augment={flip: true}"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"frozen=false: an encoder that learns"):
        train_run(read(config, source, "model.vision.frozen=false"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_kept_is_told_at_once(encoder: Path, tmp_path: Path) -> None:
    config = frozen(encoder, "decoder")
    changes = ["model.vision.frozen=false", "model.init.vision=null", "data.augment={flip: true}"]
    with pytest.raises(ValueError, match=r"(?s)frozen=false.*names no weights.*data\.augment"):
        features(config, changes, tmp_path / "kept")
    features(config, ["data.val=null"], tmp_path / "kept")
    with pytest.raises(ValueError, match=r"data\.train: holds features already"):
        features(config, [f"data.train={tmp_path / 'kept' / 'train'}"], tmp_path / "again")
    with pytest.raises(ConfigError):
        features(config, ["data.trian=x"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_numbers_and_bytes() -> None:
    info = FeatureInfo(2, 3, "float16", "e", "w", "t")
    x = torch.randn(2, 3)
    assert torch.equal(info.read(info.write(x)), x.half())
    brain = replace(info, dtype="bfloat16")
    assert torch.equal(brain.read(brain.write(x)), x.bfloat16())
    with pytest.raises(ValueError, match="float16 cannot hold"):
        info.write(x * 1e6)
    with pytest.raises(BadSample, match="11 bytes for 2 x 3"):
        info.read(bytes(11))


def test_a_full_disk_is_noticed_before(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.train.features.shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(ValueError, match="too little room"):
        features(frozen(encoder, "decoder"), [], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
