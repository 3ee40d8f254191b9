"""What is typed wrong: one message that names it, exit code 2, nothing written. And places that nothing can go to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT, Commands
from tests.faults.test_inputs import refused
from tests.tiny import picture, settings, squares, write_config


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A shard, a table, a picture, a config, a file of words, an empty folder."""
    squares(tmp_path / "squares.tar")
    write_config(tmp_path / "clip.yaml", settings("clip", Path("squares.tar")))
    (tmp_path / "red.png").write_bytes(picture("red"))
    (tmp_path / "table.csv").write_text("path,caption\nred.png,a red square\n")
    (tmp_path / "note.txt").write_text("hello\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


def usage(vlm: Commands, place: Path, arguments: str) -> str:
    """The last line; before it stands how the verb is used, and where its page is."""
    lines = refused(vlm, place, *arguments.split())
    assert (
        lines[0].startswith("Usage: vlm")
        and lines[1].startswith("Try 'vlm ")
        and lines[1].endswith("--help' for help.")
    )
    return lines[3]


# --- verbs and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "wrong", "near"),
    [("trian clip.yaml", "trian", "train"), ("shards wite a b", "wite", "write"), ("docotr", "docotr", "doctor")],
)
def test_an_unknown_verb(vlm: Commands, place: Path, arguments: str, wrong: str, near: str) -> None:
    assert usage(vlm, place, arguments) == f"Error: No such command '{wrong}'. Did you mean '{near}'?"


def test_a_verb_that_is_like_none(vlm: Commands, place: Path) -> None:
    assert usage(vlm, place, "frobnicate") == "Error: No such command 'frobnicate'."


@pytest.mark.parametrize(
    ("arguments", "wrong", "near"),
    [
        ("quickstart --overwite", "--overwite", "--overwrite"),
        ("export run out --dtyp bfloat16", "--dtyp", "--dtype"),
        ("models --jsn", "--jsn", "--json"),
        ("doctor --quik", "--quik", "--quick"),
        ("shards check a.tar --talk", "--talk", "--talks"),
    ],
)
def test_an_unknown_option(vlm: Commands, place: Path, arguments: str, wrong: str, near: str) -> None:
    assert usage(vlm, place, arguments) == f"Error: No such option '{wrong}'. Did you mean '{near}'?"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [("train --out run", "CONFIG"), ("config", "CONFIG"), ("export run", "OUT"), ("shards features clip.yaml", "OUT")],
)
def test_a_missing_argument(vlm: Commands, place: Path, arguments: str, missing: str) -> None:
    assert usage(vlm, place, arguments) == f"Error: Missing argument '{missing}'."


@pytest.mark.parametrize("arguments", ["models here", "doctor here", "completion bash here"])
def test_an_argument_too_many(vlm: Commands, place: Path, arguments: str) -> None:
    assert usage(vlm, place, arguments) == "Error: Got unexpected extra argument (here)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train clip.yaml --overfit 0", "Invalid value for '--overfit': 0 is not in the range x>=1."),
        ("shards check a.tar --min-side 0", "Invalid value for '--min-side': 0 is not in the range x>=1."),
        ("shards write a b --workers -1", "Invalid value for '--workers': -1 is not in the range x>=0."),
        ("shards write a b --max-bad-fraction 2", "Invalid value for '--max-bad-fraction': 2.0 is not in the range"),
        ("shards preview a.tar --count 0", "Invalid value for '--count': 0 is not in the range x>=1."),
        ("export a b --shard-gb 0", "Invalid value for '--shard-gb': 0.0 is not in the range x>0."),
    ],
)  # fmt: skip
def test_a_number_out_of_range(vlm: Commands, place: Path, arguments: str, message: str) -> None:
    assert usage(vlm, place, arguments).startswith(f"Error: {message}")


def test_a_word_for_a_number(vlm: Commands, place: Path) -> None:
    found = usage(vlm, place, "train clip.yaml --overfit two")
    assert found.startswith("Error: Invalid value for '--overfit': 'two' is not a valid integer")


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ("export a b --dtype float64", "'float64' is not one of 'float32', 'float16', 'bfloat16'."),
        ("shards features a b --dtype int8", "'int8' is not one of 'float16', 'bfloat16', 'float32'."),
        ("completion tcsh", "'tcsh' is not one of 'bash', 'zsh', 'fish'."),
    ],
)
def test_a_choice_that_there_is_not(vlm: Commands, place: Path, arguments: str, choices: str) -> None:
    assert usage(vlm, place, arguments).endswith(choices)


def test_options_that_exclude_one_another(vlm: Commands, place: Path) -> None:
    message = "Error: --overfit touches no run folder: give it without --resume and --overwrite"
    for other in ("--overwrite", "--resume", "--resume auto"):
        assert usage(vlm, place, f"train clip.yaml --overfit 2 {other}") == message


def test_options_that_belong_together(vlm: Commands, place: Path) -> None:
    message = "vlm: --tokenizer and --max-tokens belong together: the one counts what the other limits"
    assert refused(vlm, place, "shards", "check", "squares.tar", "--max-tokens", "9") == [message]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["train.steps", "=5", "train..steps=5", "yes"])
@pytest.mark.parametrize("verb", ["train", "config"])
def test_what_is_no_key_and_value(vlm: Commands, place: Path, verb: str, wrong: str) -> None:
    message = f"{wrong}: not an override; write key=value, such as train.steps=100"
    assert refused(vlm, place, verb, "clip.yaml", wrong) == [message]


def test_a_setting_of_the_quickstart(vlm: Commands, place: Path) -> None:
    (line,) = refused(vlm, place, "quickstart", "train.stps=5")
    assert line.endswith("1-clip.yaml: train.stps: no such setting (did you mean 'steps'?)")


@pytest.mark.parametrize("verb", ["train", "config"])
def test_a_config_that_cannot_be_read(vlm: Commands, place: Path, verb: str) -> None:
    assert refused(vlm, place, verb, "empty") == ["cannot read empty: Is a directory"]
    assert refused(vlm, place, verb, "red.png") == ["cannot read red.png: it is not UTF-8 text"]


def test_a_config_that_is_its_own_base(vlm: Commands, place: Path) -> None:
    (place / "loop.yaml").write_text("base: loop.yaml\n")
    message = "loop.yaml: base: loop.yaml has a base of its own; only one level is allowed, so merge the two"
    assert refused(vlm, place, "config", "loop.yaml") == [message]


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(vlm: Commands, place: Path) -> None:
    message = "vlm: 'nowhere' is neither a file or folder nor a name on the hub (owner/name or owner/name@revision)"
    assert refused(vlm, place, "export", "nowhere", "out") == [message]


def test_a_folder_that_is_no_model(vlm: Commands, place: Path) -> None:
    assert refused(vlm, place, "export", "empty", "out") == ["vlm: empty/config.json: is missing; there is nothing"]


def test_a_picture_for_a_model(vlm: Commands, place: Path) -> None:
    (line,) = refused(vlm, place, "export", "red.png", "out")
    assert line.startswith("vlm: red.png: refused, for it is damaged or holds more than plain tensors (")


def test_a_hub_name_to_export_without_a_network(vlm: Commands, place: Path) -> None:
    done = vlm("export", "owner/name", "out", folder=place, network="down")
    assert (done.code, done.out) == (2, "") and not (place / "out").exists()
    assert done.err.startswith("vlm: owner/name is not in the hub's cache, and the hub is out of reach (")
    assert done.err.endswith("look at the network, or download it elsewhere and give the folder in place of the name\n")


def test_a_part_to_export_that_is_not_told_whole(vlm: Commands, place: Path) -> None:
    message = "Error: Invalid value for '--part': 'eyes' is not NAME=SOURCE, such as vision=eva_vit_g.pth"
    assert usage(vlm, place, "export empty out --part eyes") == message
    message = "Error: Invalid value for '--part': vision is given 2 times"
    assert usage(vlm, place, "export empty out --part vision=a --part vision=b") == message


# --- pictures and captions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_shards_that_are_not_there(vlm: Commands, place: Path, verb: str) -> None:
    (line,) = refused(vlm, place, "shards", verb, "square.tar")
    assert line.startswith("vlm: shards 'square.tar': no file matches square.tar; that folder holds squares.tar")


@pytest.mark.parametrize(
    ("option", "column", "what", "setting"),
    [
        ("--image-key", "picture", "for the picture", "data.image"),
        ("--caption-key", "words", "for the captions", "data.caption"),
    ],
)
def test_a_column_that_the_table_lacks(
    vlm: Commands, place: Path, option: str, column: str, what: str, setting: str
) -> None:
    assert refused(vlm, place, "shards", "write", "table.csv", "out", option, column) == [
        f"vlm: table.csv: no column '{column}' {what}; CSV with the columns path, caption; "
        f"name the right one ({option}, {setting})"
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--quality 300", "quality=300: must be from 1 to 100"),
        ("--size 0", "size=0: must be from 1 to 100000"),
        ("--samples-per-shard 0", "samples=0: must be from 1 to 1000000"),
    ],
)
def test_shards_of_impossible_sizes(vlm: Commands, place: Path, option: str, message: str) -> None:
    assert refused(vlm, place, "shards", "write", "squares.tar", "out", *option.split()) == [f"vlm: {message}"]


def test_features_of_an_encoder_that_learns(vlm: Commands, place: Path) -> None:
    assert refused(vlm, place, "shards", "features", "clip.yaml", "out") == [
        "vlm: model.vision.frozen=false: what an encoder gives can be kept only while it stays as it is",
        "model.vision: names no weights, nor does model.init.vision: it would be another next time",
    ]


def test_a_preview_of_no_kind_of_picture(vlm: Commands, place: Path) -> None:
    message = "vlm: --out sheet.gif: name a file that ends in .png, .jpg, .jpeg"
    assert refused(vlm, place, "shards", "preview", "squares.tar", "--out", "sheet.gif") == [message]


# --- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quickstart --out note.txt", "vlm: --out: note.txt is a file"),
        ("train clip.yaml --out note.txt", "vlm: --out: note.txt is a file"),
        (
            "shards write squares.tar note.txt",
            "vlm: note.txt: is a file; shards are written into a folder of their own",
        ),
        ("train clip.yaml --out note.txt/run", "vlm: note.txt/run: Not a directory"),
        (
            "shards preview squares.tar --out away/sheet.png",
            "vlm: --out away/sheet.png: there is no folder away; make it first",
        ),
    ],
)
def test_a_file_where_a_folder_is_needed(vlm: Commands, place: Path, arguments: str, message: str) -> None:
    assert refused(vlm, place, *arguments.split()) == [message]


# Root may write everywhere, unless it gives that up.
OTHERS = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(OTHERS) and shutil.which(OTHERS[0]) is None, reason="root, and no setpriv (util-linux)")
def test_a_folder_that_nothing_can_be_written_into(place: Path) -> None:
    place.chmod(0o555)
    command = [*OTHERS, sys.executable, "-m", "vlm", "shards", "write", "table.csv", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    place.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last == f"vlm: {place / '.out.tmp'}: Permission denied"


def test_nobody_reads_on(place: Path) -> None:
    """`vlm models --json | head -c 1`: neither a traceback nor a complaint."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vlm", "models", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        _, told = process.communicate()
    assert process.returncode != 0 and told == ""


def test_a_result_that_a_program_reads_holds_nothing_else(vlm: Commands, place: Path) -> None:
    """The bad input is told on the other stream, so that a pipe gets nothing that is half right."""
    done = vlm("models", "--json", folder=place)
    assert (done.code, done.err) == (0, "") and len(json.loads(done.out)) > 10
    done = vlm("config", "clip.yaml", "train.steps=0", folder=place)
    assert (done.code, done.out) == (2, "") and done.err == "clip.yaml: train.steps: must be more than 0, got 0\n"
