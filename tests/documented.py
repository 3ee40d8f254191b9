"""The commands that README.md and docs/ show, and small things under the names that they speak of."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests import folders_own
from tests.command import Commands
from tests.eval.test_score import ANSWERS, REFERENCES, RESULTS, VQA
from tests.folders import photographs
from tests.test_export import RUNS, STEPS
from tests.tiny import COLOURS, picture, settings, squares, write_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FEW = ["train.steps=2", "train.batch_size=2", "train.warmup=0", "train.log_every=1", "train.precision=float32"]


class Shown(NamedTuple):
    """A command as it is documented, without its comment, and the lines shown below it."""

    page: str
    block: int
    command: str
    printed: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """What is shown is a refusal: exit code 2, and exactly these lines."""
        return any(re.match(r"vlm: |\S+\.yaml: ", line) for line in self.printed)


def shown() -> Iterator[Shown]:
    """All of all pages, in their order."""
    for page in PAGES:
        blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for number, block in enumerate(blocks):
            for piece in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
                command, *printed = piece.splitlines()
                name = str(page.relative_to(ROOT))
                yield Shown(name, number, re.sub(r" {2,}#.*| {2,}(?=\S)", " ", command).strip(), tuple(printed))


def world(place: Path, vlm: Commands) -> Path:
    """Every file and folder that is spoken of, in small."""
    folders_own.everything(place)
    for name in ("configs", "vlm", "demos"):
        (place / name).symlink_to(ROOT / name)
    _pictures(place)
    _published(place)
    _runs(place, vlm)
    _scored(place)
    _records(place, vlm)
    return place


def _pictures(place: Path) -> None:
    rows = [("path", "caption")]
    for name in ("my_folder", "folder"):
        (place / name).mkdir()
        for colour in COLOURS:
            (place / name / f"{colour}.png").write_bytes(picture(colour))
            (place / name / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    rows += [(f"{colour}.png", f"a {colour} square") for colour in COLOURS]
    with (place / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    photographs(1)[0].save(place / "photo.jpg")
    (place / "shards").mkdir()
    for number in range(2):
        squares(place / "shards" / f"{number:03d}.tar", prefix=f"{number}-")
    texts = place / "runs" / "python-text"
    texts.mkdir(parents=True)
    for split in ("train", "val"):
        lines = [json.dumps({"text": f"{colour} is a colour, as the others are. " * 60}) for colour in COLOURS]
        (texts / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_config(place / "CONFIG", settings("clip", Path("shards/000.tar")))
    lora = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    (place / "lora.yaml").write_text(re.findall(r"```yaml\n(.*?)```", lora, re.DOTALL)[0], encoding="utf-8")


def _published(place: Path) -> None:
    """Names of the hub as folders, which are looked at before the hub is."""
    names = {"Salesforce/blip2-opt-2.7b": "blip2-opt", "llava-hf/llava-1.5-7b-hf": "llava", "FOLDER": "vicuna"}
    names |= {"facebook/opt-2.7b": "lavis/language"}
    names |= {"blip2_pretrained_opt2.7b.pth": "lavis/blip2.pth", "eva_vit_g.pth": "lavis/eva_vit_g.pth"}
    for name, there in names.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).symlink_to(place / there)


def _runs(place: Path, vlm: Commands) -> None:
    """The quickstart's three, of one step; one for LoRA to start from; one that transformers can open."""
    stages = {name: [f"vlm/quickstart/{name}.yaml", *FEW] for name in ("1-clip", "2-qformer", "3-caption")}
    runs = {f"quickstart/{name}": stage for name, stage in stages.items()}
    vocabulary = "tokenizer={kind: file, path: runs/quickstart/1-clip/tokenizer.json}"
    for name in ("2-qformer", "3-caption"):
        runs[f"quickstart/{name}"] += [vocabulary, "model.init.vision=runs/quickstart/1-clip"]
    runs["base"] = ["configs/tiny/adapter.yaml", *FEW, "train.params=[{match: '.*', lr: 1.0e-3}]"]
    config, *given = RUNS["linear"]
    runs["linear"] = [f"configs/tiny/{config}.yaml", *given, *STEPS]
    for name, arguments in runs.items():
        done = vlm("train", *arguments, "--out", f"runs/{name}", folder=place)
        assert done.code == 0, done.err
    shutil.copytree(place / "runs" / "linear", place / "runs" / "mine")


def _scored(place: Path) -> None:
    """Captions and answers that some tool wrote, beside what people said."""
    files = {"results.json": RESULTS, "one.json": RESULTS[:1], "answers.json": ANSWERS}
    files |= dict.fromkeys(["captions_val2014.json", "captions.json"], REFERENCES)
    for name, content in {**files, "v2_mscoco_val2014_annotations.json": VQA}.items():
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    (place / "val2014" / "x").mkdir(parents=True)
    for name, colour in (("red", "red"), ("green", "green"), ("x/7", "blue")):
        (place / "val2014" / f"{name}.png").write_bytes(picture(colour))


def _records(place: Path, vlm: Commands) -> None:
    """An index and two evaluations; what is copied to."""
    runs = place / "runs"
    (runs / "clip").symlink_to(runs / "quickstart" / "1-clip")
    shutil.copy(place / "photos" / "0.png", place / "cat.jpg")
    for name in ("bicycles", "sunsets"):
        (place / name).mkdir()
    data = ("vlm/quickstart/data/test-0000.tar", "--caption", "json:caption")
    commands = [("index", "photos", "photos/.index", "-m", "runs/clip")]
    commands += [
        ("evaluate", *data, "-m", f"runs/quickstart/{run}", "--task", "retrieval", "--out", f"runs/{name}")
        for name, run in (("e1", "1-clip"), ("e2", "2-qformer"))
    ]
    for command in commands:
        done = vlm(*command, folder=place)
        assert done.code == 0, done.err


def copy(place: Path, folder: Path) -> Path:
    """Links to everything there, so that a command may replace what it writes and nothing else."""
    folder.mkdir()
    for entry in place.iterdir():
        if entry.name != "runs":
            (folder / entry.name).symlink_to(entry.resolve() if entry.is_symlink() else entry)
    (folder / "runs").mkdir()
    for run in (place / "runs").iterdir():
        (folder / "runs" / run.name).symlink_to(run)
    return folder
