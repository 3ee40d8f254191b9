"""Published checkpoints on the command line, as processes without a network: captions, answers, retrieval."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests import folders, folders_own
from tests.command import Commands, Done
from tests.folders import Made, photographs, written
from tests.folders_own import Files
from tests.model.hub_site import serving
from tests.model.test_load import CASES, MADE, whole
from tests.tiny import pack
from vlm.model.transcribe import one_line

pytestmark = pytest.mark.slow
COUNT = 24


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(photographs(2)):
        picture.save(folder / f"{i}.png")
    return folder


def run(vlm: Commands, folder: Path, *arguments: object) -> Done:
    return vlm(*arguments, folder=folder, network="forbidden")


def said(done: Done) -> list[str]:
    """The captions. All must have gone well, and in silence."""
    assert (done.code, done.err) == (0, "")
    return [json.loads(line)["caption"] for line in done.out.splitlines()]


@pytest.mark.parametrize("name", MADE)
def test_captions_and_answers(name: str, vlm: Commands, pictures: Path, tmp_path: Path) -> None:
    given = MADE[name](tmp_path / "published")
    found = run(vlm, tmp_path, "caption", pictures, *given.options, "--json", "--max-new", "9")
    if name == "minigpt4":
        assert len(said(found)) == 2
        drawn = run(vlm, tmp_path, "caption", pictures, *given.options, "--seed", "3")
        assert drawn.code == 0 and drawn == run(vlm, tmp_path, "caption", pictures, *given.options, "--seed", "3")
        return
    prompt, question_prompt, how, question, short = CASES[name]
    seen = photographs(2)
    assert said(found) == written(given.made, seen, prompt, do_sample=False, max_new_tokens=9)
    usual = run(vlm, tmp_path, "caption", pictures / "0.png", *given.options)
    assert (usual.code, usual.err) == (0, "")
    assert usual.out.split("\t")[1] == one_line(written(given.made, seen[:1], prompt, do_sample=False, **how)[0]) + "\n"
    answers = run(vlm, tmp_path, "caption", pictures, *given.options, "--json", "--ask", question)
    assert said(answers) == written(given.made, seen, question_prompt, do_sample=False, **short)


@pytest.mark.parametrize("layout", ["memory", "authors", "coca"])
def test_other_layouts_caption(layout: str, vlm: Commands, pictures: Path, tmp_path: Path) -> None:
    if layout == "coca":
        folder, model, tokenizer = folders_own.coca(tmp_path / "coca")
        found = said(run(vlm, tmp_path, "caption", pictures, "--model", folder, "--json", "--max-new", "9"))
        seen = map(model_transform(folder), photographs(2))
        assert found == [folders_own.coca_written(model, tokenizer, picture, 9) for picture in seen]
        return
    made = folders.llava(tmp_path / "hub")
    if layout == "authors":
        given = folders_own.llava_of_authors(made, tmp_path / "own")
    else:
        given = Files(folders_own.llava_in_memory(made, tmp_path / "own"), {}, made)
    found = said(run(vlm, tmp_path, "caption", pictures, *given.options, "--json", "--max-new", "9"))
    prompt = CASES["llava"][0]
    assert found == written(made, photographs(2), prompt, do_sample=False, max_new_tokens=9)


def model_transform(folder: Path) -> Callable[[Image.Image], Tensor]:
    """open_clip's own, as its folder says it."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    said = json.loads((folder / "open_clip_config.json").read_text())
    transform: Callable[[Image.Image], Tensor] = image_transform_v2(
        PreprocessCfg(**{"size": said["model_cfg"]["vision_cfg"]["image_size"], **said["preprocess_cfg"]}), False
    )
    return transform


def shard(folder: Path) -> tuple[Path, list[Image.Image], list[str]]:
    """Pictures with captions of their own."""
    colours = ["red", "blue", "green", "a red", "a blue", "a green"]
    seen = photographs(COUNT)
    texts = [f"{colours[i % 6]} {['photo', 'image', 'square', 'caption'][i // 6]}" for i in range(COUNT)]
    members = []
    for i, (picture, text) in enumerate(zip(seen, texts, strict=True)):
        out = io.BytesIO()
        picture.save(out, "PNG")
        members += [(f"{i:03d}.png", out.getvalue()), (f"{i:03d}.txt", text.encode())]
    return pack(folder / "squares.tar", members), seen, texts


def recalls(scores: Tensor) -> dict[str, float]:
    """Of images by texts (scores: texts x images), the one on the diagonal being right; nothing of ours is used."""
    ranks = 1 + (scores >= scores.diagonal()[:, None]).sum(1) - 1
    return {f"R@{k}": 100 * float((ranks <= k).double().mean()) for k in (1, 5, 10)}


@torch.no_grad()
def contrast(made: Made, seen: list[Image.Image], texts: list[str]) -> Tensor:
    """Their scores, images x texts."""
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 16}
    if not isinstance(made.model, folders.SiglipModel):
        padding = {"padding": True}
    given = made.processor.tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **padding)
    if "max_length" in padding:
        given.pop("attention_mask")
    pixels = made.processor.image_processor(seen, return_tensors="pt")["pixel_values"]
    logits: Tensor = made.model(pixel_values=pixels, **given).logits_per_image
    return logits


@pytest.mark.parametrize("maker", [folders.clip, folders.siglip])
def test_retrieval(maker: Callable[[Path], Made], vlm: Commands, tmp_path: Path) -> None:
    made = maker(tmp_path / "published")
    tar, seen, texts = shard(tmp_path)
    done = run(vlm, tmp_path, "evaluate", tar, "--model", made.folder, "--caption", "txt", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)["tasks"]["retrieval"]
    scores = contrast(made, seen, texts)
    for way, wanted in (("i2t", recalls(scores)), ("t2i", recalls(scores.T))):
        assert {name: found["metrics"]["itc"][way][name] for name in wanted} == pytest.approx(wanted)
    assert found["counts"]["images"] == COUNT


@pytest.mark.parametrize(("layout", "temperature"), [("hub", 1.0), ("lavis", 0.4)])
@torch.no_grad()
def test_retrieval_of_blip2_with_its_matching_head(
    layout: str, temperature: float, vlm: Commands, tmp_path: Path
) -> None:
    if layout == "hub":
        published = whole(folders.retrieval(tmp_path / "published"))
    else:
        published = folders_own.lavis_stage1(tmp_path / "published", temperature)
    tar, seen, texts = shard(tmp_path)
    made = published.made
    given = made.processor.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    pixels = made.processor.image_processor(seen, return_tensors="pt")["pixel_values"]
    itc = made.model(pixel_values=pixels, use_image_text_matching_head=False, **given).logits_per_image
    rows = []
    for picture in pixels:
        many = picture.expand(COUNT, -1, -1, -1)
        logits = made.model(pixel_values=many, use_image_text_matching_head=True, **given).logits_per_image
        rows.append(logits.softmax(1)[:, 1])
    itm = torch.stack(rows) + itc / temperature
    options = ("--caption", "txt", "--json", "--rerank", COUNT, "--task", "retrieval")
    done = run(vlm, tmp_path, "evaluate", tar, *published.options, *options)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)["tasks"]["retrieval"]["metrics"]
    for name, scores in (("itc", itc), ("itm", itm)):
        for way, wanted in (("i2t", recalls(scores)), ("t2i", recalls(scores.T))):
            assert {key: found[name][way][key] for key in wanted} == pytest.approx(wanted)
    assert found["itc"] != found["itm"]


def test_a_first_stage_writes_with_its_own_head(vlm: Commands, pictures: Path, tmp_path: Path) -> None:
    published = folders_own.lavis_stage1(tmp_path / "published", 0.07)
    found = said(run(vlm, tmp_path, "caption", pictures, *published.options, "--json", "--max-new", "6"))
    assert len(found) == 2 and all(found)
    alone = run(vlm, tmp_path, "caption", pictures, "--model", published.main)
    assert alone.code == 2 and f"{published.main}: no tokenizer in it" in alone.err


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)


def shown() -> list[tuple[str, list[str]]]:
    """The page's commands, each with what it prints."""
    pieces = [piece for block in BLOCKS for piece in re.split(r"^\$ ", block, flags=re.MULTILINE) if piece]
    return [(piece.partition("\n")[0].split("   #")[0], piece.splitlines()[1:]) for piece in pieces]


def form(line: str) -> str:
    """What of a line is the same on every machine: not a random model's words and numbers, not how long it took."""
    if line.startswith("vlm: "):
        return line
    before, tab, _ = line.partition("\t")
    plain = re.sub(r"[\d.,]+", "N", before).split("samples/s")[0]
    return " ".join(plain.split()) + tab


def alone(arguments: list[str], folder: Path, **variables: str) -> Done:
    """As a process of its own, which reads these variables at its very start; the hub's cache begins empty."""
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "vlm", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_name_on_a_hub_and_then_its_cache_alone(pictures: Path, tmp_path: Path) -> None:
    made = folders.instructblip(tmp_path / "published")
    files = [file for file in made.folder.rglob("*") if file.is_file()]
    wanted = written(made, photographs(2), CASES["instructblip"][0], do_sample=False, max_new_tokens=6)
    arguments = ["caption", str(pictures), "--model", "authors/instructblip", "--json", "--max-new", "6"]
    with serving() as hub:
        hub.repositories["authors/instructblip"] = {
            str(file.relative_to(made.folder)): file.read_bytes() for file in files
        }
        first = alone(arguments, tmp_path, HF_ENDPOINT=hub.url)
        assert first.code == 0 and [json.loads(line)["caption"] for line in first.out.splitlines()] == wanted
    again = alone(arguments, tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url)
    assert (again.code, again.out, again.err) == (0, first.out, "")


def test_the_page_s_commands_print_what_it_shows(tmp_path: Path, vlm: Commands) -> None:
    folders_own.everything(tmp_path)
    (tmp_path / "mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert len(shown()) >= 8
    for command, printed in shown():
        words = shlex.split(command)
        if words[0] == "HF_HUB_OFFLINE=1":
            done = alone(words[2:], tmp_path, HF_HUB_OFFLINE="1")
        else:
            done = vlm(*words[1:], folder=tmp_path, network="forbidden")
        found = [*done.err.splitlines(), *done.out.splitlines()]
        assert [form(line) for line in found] == [form(line) for line in printed], command
        assert done.code == (2 if printed[0].startswith("vlm: ") else 0)


def test_the_page_is_short_and_its_links_lead_somewhere() -> None:
    assert len(PAGE.partition("## Loading")[0].splitlines()) <= 150
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
