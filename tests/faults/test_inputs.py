"""Bad input on the real command line: the exact message, the exit code, no traceback, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import ROOT, Commands, Done, wait_for
from tests.tiny import members, pack, picture, settings, squares, write_config
from vlm import checkpoint


@pytest.fixture(scope="module")
def trained(vlm: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard, the configs, and a finished run of each kind."""
    folder = tmp_path_factory.mktemp("trained")
    squares(folder / "squares.tar")
    for kind in ("clip", "qformer", "decoder"):
        write_config(folder / f"{kind}.yaml", settings(kind, Path("squares.tar")))
        assert vlm("train", f"{kind}.yaml", folder=folder).code == 0
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a shard and a config, and nothing else."""
    squares(tmp_path / "squares.tar")
    write_config(tmp_path / "clip.yaml", settings("clip", Path("squares.tar")))
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(vlm: Commands, folder: Path, *arguments: object, code: int = 2, stdin: str = "") -> list[str]:
    """The lines of a refusal that leaves the folder as it was."""
    before = snapshot(folder)
    done = vlm(*arguments, folder=folder, stdin=stdin)
    assert "Traceback" not in done.err
    assert (done.code, done.out) == (code, ""), done.err
    assert snapshot(folder) == before
    return done.err.splitlines()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["train.stps=5"], ["clip.yaml: train.stps: no such setting (did you mean 'steps'?)"]),
        (
            ["model.vison.name=x", "train.steps=many"],
            [
                "clip.yaml: model.vison: no such setting (did you mean 'vision'?)",
                "clip.yaml: train.steps: expected a whole number, got 'many'",
            ],
        ),
        (["data.train=7"], ["clip.yaml: data.train: expected text, got 7; or expected a list, got 7"]),
        (["train.batch_size=-3"], ["clip.yaml: train.batch_size: must be more than 0, got -3"]),
        (["train"], ["train: not an override; write key=value, such as train.steps=100"]),
        (["model.connector={kind: qformer"], None),
        (
            ["losses=[{kind: itm}, {kind: lm}]"],
            [
                "clip.yaml: losses: itm needs model.connector.kind=qformer with text=true",
                "clip.yaml: losses: itm draws its hard negatives by itc, which is not among the losses",
                "clip.yaml: losses: lm needs model.language, or model.connector.kind=qformer with text=true",
            ],
        ),
    ],
)
@pytest.mark.parametrize("verb", ["config", "train"])
def test_mistakes_in_settings(vlm: Commands, place: Path, verb: str, overrides: list[str], lines: list[str]) -> None:
    found = refused(vlm, place, verb, "clip.yaml", *overrides)
    if lines is None:
        assert found[0].startswith("model.connector={kind: qformer: the value is not YAML (")
    else:
        assert found == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2", "wrong.yaml: line 1: expected ',' or ']', but got '<stream end>'"),
        ("just words", "wrong.yaml: expected settings such as 'seed: 0', got 'just words'"),
        ("", "wrong.yaml: expected settings such as 'seed: 0', got an empty file"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "wrong.yaml: line 2: 'train' is written twice"),
    ],
)
def test_a_config_that_is_none(vlm: Commands, place: Path, text: str, message: str) -> None:
    (place / "wrong.yaml").write_text(text)
    assert refused(vlm, place, "train", "wrong.yaml") == [message]


def test_a_config_that_is_not_there(vlm: Commands, place: Path) -> None:
    assert refused(vlm, place, "train", "clp.yaml") == ["cannot read clp.yaml: No such file or directory"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.name=vit_tiny_patch16_225", "model.vision.name: timm has no model 'vit_tiny_patch16_225'"),
        ("model.text.heads=5", "heads=5 does not divide dim=24"),
        ("train.params=[{match: 'vison.*', lr: 1}]", "train.params: 'vison.*' matches no parameter"),
        ("train.params=[{match: '(', lr: 1}]", "train.params: '(' is not a regular expression"),
        ("tokenizer.vocab=100", "vocab=100: a byte-level vocabulary needs at least 260"),
        ("tokenizer={kind: file, path: none.json}", "none.json: No such file or directory"),
        ("model.init.vision=runs/none", "model.init.vision: no folder of a run (it has no config.yaml); 'runs/none'"),
        ("train.batch_size=99", "batch_size=99 exceeds the 16 usable samples; make it smaller"),
        ("data.max_tokens=2", "max_tokens=2: start, end and one word need at least 3"),
        ("data.augment.scale=[1.5, 1]", "augment.scale=(1.5, 1.0): must be 0 or more, a range must rise from above 0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_world(vlm: Commands, place: Path, override: str, message: str) -> None:
    found = refused(vlm, place, "train", "clip.yaml", override)
    assert any(line.removeprefix("vlm: ").startswith(message) for line in found), found


# --- shards ----------------------------------------------------------------------------------------------------------


def test_no_shard_matches(vlm: Commands, place: Path) -> None:
    (line,) = refused(vlm, place, "train", "clip.yaml", "data.train=square-{000..003}.tar")
    start = "vlm: shards 'square-{000..003}.tar': no file matches square-000.tar; that folder holds squares.tar"
    assert line.startswith(start)


def test_a_shard_without_usable_samples(vlm: Commands, place: Path) -> None:
    pack(place / "other.tar", [("a.jpg", picture("red")), ("a.cls", b"3"), ("b.jpg", picture("blue"))])
    assert refused(vlm, place, "train", "clip.yaml", "data.train=other.tar") == [
        "vlm: other.tar: no sample has both picture and caption. Wanted image='jpg;png;jpeg;webp', "
        "caption='txt;json:caption'; suffixes found: jpg (2), cls (1)"
    ]


def test_a_shard_that_is_none(vlm: Commands, place: Path) -> None:
    (place / "bad.tar").write_bytes(b"<html>404</html>" * 100)
    found = refused(vlm, place, "train", "clip.yaml", "data.train=bad.tar")
    assert found[0].startswith("vlm: bad.tar: is not a tar file, or its very beginning is damaged; fetch or write it")
    assert found[1:] == ["bad.tar: no sample has both picture and caption"]


def spoilt(folder: Path, good: int, corrupt: int, empty: int = 0, cut: bool = False) -> Path:
    """A shard of good samples, corrupt pictures and empty captions, perhaps cut off in the last good one."""
    bad = [
        (f"c{i}.{k}", data) for i in range(corrupt) for k, data in (("png", b"\x89PNG no"), ("txt", b"a red square"))
    ]
    bad += [(f"e{i}.{k}", data) for i in range(empty) for k, data in (("png", picture("red")), ("txt", b" \n "))]
    path = pack(folder / "spoilt.tar", bad + members(good))
    if cut:
        path.write_bytes(path.read_bytes().rstrip(b"\0")[:-5])
    return path


def test_bad_samples_are_counted_and_training_goes_on(vlm: Commands, place: Path) -> None:
    spoilt(place, good=14, corrupt=1, empty=1, cut=True)
    limits = ("train.steps=8", "data.max_bad_fraction=0.9")
    done = vlm("train", "clip.yaml", "data.train=spoilt.tar", *limits, "--out", "run", folder=place)
    assert done.code == 0, done.err
    assert "spoilt.tar: is cut off or damaged at or after byte" in done.err
    assert "the 15 samples before that are used" in done.err
    assert "unusable sample spoilt.tar: c0: not an image" in done.err
    (summary,) = [line for line in done.err.splitlines() if line.startswith("unusable samples: ")]
    assert "1 x damaged shard" in summary
    assert "x empty caption" in summary
    state = checkpoint.read_state(checkpoint.latest(place / "run"))
    assert state["bad"]["damaged shard"] == 1
    assert set(state["bad"]) == {"damaged shard", "empty caption", "not an image"}


def test_too_many_bad_samples_abort_with_counts(vlm: Commands, place: Path) -> None:
    spoilt(place, good=16, corrupt=6)
    done = vlm("train", "clip.yaml", "data.train=spoilt.tar", "train.steps=100", "--out", "run", folder=place)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("vlm: spoilt.tar: ")
    assert "samples are unusable (not an image: " in last
    assert last.endswith("more than max_bad_fraction=0.05; repair the shards, or raise max_bad_fraction")


# --- run folders -----------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_another_run(vlm: Commands, trained: Path) -> None:
    for arguments in ([], ["--out", "runs/clip"]):
        assert refused(vlm, trained, "train", "clip.yaml", *arguments) == [
            "vlm: runs/clip holds a run already: choose another --out, --resume it, or --overwrite it"
        ]


def test_resume_without_a_run(vlm: Commands, trained: Path) -> None:
    assert refused(vlm, trained, "train", "clip.yaml", "--out", "new", "--resume") == [
        "vlm: --resume: new holds no run (no config.yaml)"
    ]
    assert refused(vlm, trained, "train", "clip.yaml", "train.steps=9", "--resume") == [
        "vlm: --resume: the settings differ from runs/clip/config.yaml; "
        "resume with that file, or start another folder:",
        "  train.steps: was 4, now 9",
    ]


def test_out_is_a_file(vlm: Commands, place: Path) -> None:
    assert refused(vlm, place, "train", "clip.yaml", "--out", "squares.tar") == ["vlm: --out: squares.tar is a file"]


@pytest.mark.parametrize("verb", [["evaluate", "squares.tar", "-m", "RUN"], ["caption", "red.png", "-m", "RUN"]])
def test_what_is_no_run(vlm: Commands, place: Path, verb: list[str]) -> None:
    (place / "red.png").write_bytes(picture("red"))
    (place / "begun").mkdir()
    write_config(place / "begun" / "config.yaml", settings("clip", Path("squares.tar")))
    for run, message in {
        ".": "vlm: . is neither the folder of a run (no config.yaml) nor a published checkpoint",
        "nowhere": "vlm: 'nowhere' is neither a file or folder nor a name on the hub "
        "(owner/name or owner/name@revision)",
        "begun": "vlm: begun holds no checkpoint yet: let it train up to its first save",
    }.items():
        assert refused(vlm, place, *(run if word == "RUN" else word for word in verb)) == [message]


def test_a_run_that_cannot_do_it(vlm: Commands, trained: Path) -> None:
    assert refused(vlm, trained, "evaluate", "squares.tar", "--model", "runs/decoder", "--task", "retrieval") == [
        "vlm: runs/decoder was trained without itc, so it cannot rank images and texts"
    ]
    (trained / "red.png").write_bytes(picture("red"))
    assert refused(vlm, trained, "caption", "red.png", "--model", "runs/clip") == [
        "vlm: runs/clip was trained without lm, so it cannot write captions"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new", "0"], "vlm: --max-new 0: at least 1"),
        (["--min-new", "-1"], "vlm: --min-new -1: at least 0, at most --max-new"),
        (["--temperature", "-1"], "vlm: --temperature -1: 0 (the likeliest word) or more"),
        (["--top-p", "0"], "vlm: --top-p 0: above 0, at most 1"),
        (["--top-k", "0", "--repetition-penalty", "0"], "vlm: --top-k 0: at least 1"),
        (["--max-new", "99"], "vlm: max_new=99: this Q-Former was built for texts of 12 tokens"),
    ],
)
def test_options_out_of_range(vlm: Commands, trained: Path, options: list[str], message: str) -> None:
    (trained / "red.png").write_bytes(picture("red"))
    assert refused(vlm, trained, "caption", "red.png", "--model", "runs/qformer", *options) == [message]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "squares.tar", "-mruns/clip", "--rerank", "0"], "Invalid value for '--rerank': 0 is not in"),
        (["train", "clip.yaml", "--stps=3"], "No such option '--stps'"),
        (["caption", "--model", "runs/qformer"], "Missing argument 'IMAGE...'"),
        (["trian"], "No such command 'trian'"),
    ],
)  # fmt: skip
def test_wrong_arguments(vlm: Commands, trained: Path, arguments: list[str], message: str) -> None:
    found = "\n".join(refused(vlm, trained, *arguments))
    assert found.startswith("Usage: ")
    assert message.replace("'", "") in found.replace("'", "")


def test_no_picture(vlm: Commands, trained: Path) -> None:
    (trained / "empty").mkdir(exist_ok=True)
    (line,) = refused(vlm, trained, "caption", "empty", "--model", "runs/qformer")
    assert line.startswith("vlm: empty: no picture in this folder (.bmp, ")
    assert refused(vlm, trained, "caption", "non.png", "-m", "runs/qformer") == ["vlm: non.png: no such file or folder"]


def crafted(trained: Path, folder: Path, kind: str, change: Any) -> Path:
    """A copy of a run whose weights were changed."""
    newest = checkpoint.latest(trained / "runs" / kind)
    copy = folder / "runs" / kind / newest.name
    copy.mkdir(parents=True)
    for name in ("config.yaml", "tokenizer.json"):
        (copy.parent / name).write_bytes((newest.parent / name).read_bytes())
    tensors = load_file(newest / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    checkpoint.seal(copy, checkpoint.read_state(newest))
    return copy


def test_features_that_are_not_numbers(vlm: Commands, trained: Path, tmp_path: Path) -> None:
    squares(tmp_path / "squares.tar")
    crafted(trained, tmp_path, "clip", lambda tensors: tensors["contrast.image.weight"].fill_(torch.nan))
    (line,) = refused(vlm, tmp_path, "evaluate", "squares.tar", "--model", "runs/clip", "--json")
    assert "finite" in line


def test_a_checkpoint_that_does_not_fit(vlm: Commands, trained: Path, tmp_path: Path) -> None:
    squares(tmp_path / "squares.tar")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["contrast.extra"] = tensors.pop("contrast.log_scale")
        tensors["text.position"] = torch.zeros(7, 24)

    copy = crafted(trained, tmp_path, "clip", change).relative_to(tmp_path)
    assert refused(vlm, tmp_path, "evaluate", "squares.tar", "--model", "runs/clip") == [
        f"vlm: {copy} does not fit the model of its config:",
        "  missing: contrast.log_scale 1",
        "  not in the model: contrast.extra 1",
        "  other shape: text.position is 7x24, the model's is 12x24",
    ]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_the_run_can_go_on(vlm: Commands, place: Path) -> None:
    def stop_after(text: str) -> Any:
        def meanwhile(process: int, err: Path) -> None:
            wait_for(err, text)
            os.kill(process, signal.SIGINT)

        return meanwhile

    def stopped(done: Done) -> int:
        assert (done.code, done.out) == (130, ""), done.err
        assert "Traceback" not in done.err
        step = checkpoint.read_state(checkpoint.latest(place / "run"))["step"]
        last = done.err.strip().splitlines()[-1]
        way_on = "go on with: vlm train run/config.yaml --out run --resume"
        assert last == f"train: stopped and saved at step {step}; {way_on}"
        return int(step)

    endless = ("train.steps=100000", "--out", "run")
    first = stopped(vlm("train", "clip.yaml", *endless, folder=place, meanwhile=stop_after("train 1/100000")))
    resume = ("train", "run/config.yaml", "--out", "run", "--resume")
    again = vlm(*resume, folder=place, meanwhile=stop_after(f"train {first + 1}/100000"))
    assert f"resuming run at step {first}" in again.err
    assert stopped(again) > first
    steps = [json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_python_m_vlm(place: Path) -> None:
    """The same without the fork."""
    arguments = [sys.executable, "-m", "vlm", "config", str(place / "clip.yaml"), "train.stps=1"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("clip.yaml: train.stps: no such setting (did you mean 'steps'?)\n")
