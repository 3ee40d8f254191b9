"""The verbs hand their arguments on; what a user can mend is one message and an exit code."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm import __version__, cli
from vlm.captioning.wishes import DTYPES, FORMATS, Words, Work
from vlm.cli_caption import DTYPES as DTYPES_OFFERED
from vlm.cli_caption import FORMATS as FORMATS_OFFERED
from vlm.config.load import ConfigError


class Recorder:
    """Stands in for what a verb calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        return []


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line with recorders below it; returns the exit code and what was called."""

    def run(*arguments: str, error: BaseException | None = None) -> tuple[int, list[Any]]:
        recorder = Recorder(error)
        below = SimpleNamespace(train=recorder, quickstart=recorder, caption=recorder, evaluate=recorder)
        below.check, below.preview = recorder, recorder
        below.export, below.compare, below.Request = recorder, recorder, dict
        names = (
            "vlm.train.run",
            "vlm.quickstart.run",
            "vlm.eval.run",
            "vlm.captioning.run",
            "vlm.eval.doctor",
            "vlm.eval.preview",
            "vlm.eval.tasks",
            "vlm.eval.compare",
        )
        for name in (*names, "vlm.export"):
            monkeypatch.setitem(sys.modules, name, below)
        monkeypatch.setattr(sys, "argv", ["vlm", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), recorder.calls

    return run


def test_arguments_of_export_arrive(vlm: Any) -> None:
    assert vlm("export", "run", "out") == (0, [(("run", Path("out"), {}, None, 5.0, False, False), {})])
    more = ["--part", "vision=a=b.pth", "--part", "language=l", "--dtype", "bfloat16", "--shard-gb", "2"]
    given = vlm("export", "x.pth", "out", *more, "--adapters", "--overwrite")
    parts = {"vision": "a=b.pth", "language": "l"}
    assert given == (0, [(("x.pth", Path("out"), parts, "bfloat16", 2.0, True, True), {})])


def test_arguments_of_evaluate_and_compare_arrive(vlm: Any) -> None:
    code, [(given, named)] = vlm("evaluate", "a.tar", "b.tar", "-m", "run")
    asked = {"shards": ("a.tar", "b.tar"), "caption": None, "protocol": None, "rerank": 16, "seed": 0}
    asked |= dict.fromkeys(["images", "features", "labels", "classes", "templates", "annotations"])
    plain = {"dtype": "float32", "overwrite": False, "json": False, "parts": {}}
    assert (code, given) == (0, ("run", asked, (), None))
    assert named == plain | {"command": "vlm evaluate a.tar b.tar -m run", "names": None}
    more = ("--task", "retrieval", "--task", "classification", "--protocol", "coco-1k", "--rerank", "9", "--seed", "3")
    paths = ("--out", "there", "--features", "kept", "--images", "pictures", "--labels", "cls", "--classes", "c.txt")
    code, [(given, named)] = vlm("evaluate", "d.json", "-m", "run", *more, *paths, "--dtype", "bfloat16", "--overwrite")
    assert code == 0 and given[2:] == (("retrieval", "classification"), Path("there"))
    assert given[1] == {
        **{"shards": ("d.json",), "caption": None, "protocol": "coco-1k", "rerank": 9, "seed": 3},
        **{"images": Path("pictures"), "features": Path("kept"), "labels": "cls"},
        **{"classes": "c.txt", "templates": None, "annotations": None},
    }
    assert (named["dtype"], named["overwrite"]) == ("bfloat16", True)
    given = vlm("compare", "one", "two", "--out", "there", "--json")
    assert given == (0, [((Path("one"), Path("two"), Path("there")), {"overwrite": False, "seed": 0, "json": True})])


def test_arguments_arrive(vlm: Any) -> None:
    defaults = {"out": Path("runs/x"), "resume": False, "overwrite": False}
    assert vlm("train", "configs/x.yaml") == (0, [((Path("configs/x.yaml"), []), defaults)])
    given = vlm("train", "x.yaml", "a.b=1", "--out", "there", "c=-2", "--resume", "--overwrite")
    assert given == (
        0,
        [((Path("x.yaml"), ["a.b=1", "c=-2"]), {"out": Path("there"), "resume": True, "overwrite": True})],
    )
    given = vlm("quickstart", "train.seed=1")
    assert given == (0, [((Path("runs/quickstart"),), {"overwrite": False, "overrides": ("train.seed=1",)})])
    drawn = vlm(
        *("caption", "a.png", "-", "--model", "run", "--json", "--part", "vision=eva.pth"),
        *("--max-new", "9", "--temperature", "0.5", "--output", "o.jsonl", "-0q"),
    )
    words, work = Words(max_new=9, temperature=0.5), Work(format="jsonl", output=Path("o.jsonl"), null=True, quiet=True)
    assert drawn == (0, [(("run", ["a.png", "-"], words, work, {"vision": "eva.pth"}), {})])
    assert vlm("caption", "a.png", "-m", "run") == (0, [(("run", ["a.png"], Words(), Work(), {}), {})])
    given = vlm("shards", "preview", "a.tar", "--out", "s.jpg", "--count", "3")
    assert given == (0, [((["a.tar"], None, Path("s.jpg"), 3, 3), {})])
    limits = {"image": None, "caption": None, "min_side": 1, "max_tokens": None, "max_bad_fraction": 0.1}
    limits |= {"config": None, "tokenizer": None, "workers": 2, "talks": False, "json": False}
    given = vlm("shards", "check", "a.tar", "--workers", "2", "--max-bad-fraction", "0.1")
    assert given == (1, [((["a.tar"],), limits)])  # the recorder returns None, which is not healthy


def test_what_the_options_of_caption_offer_is_there() -> None:
    assert (FORMATS_OFFERED, DTYPES_OFFERED) == (FORMATS, DTYPES)


def test_version_and_help(vlm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert vlm("--version") == (0, [])
    assert capsys.readouterr().out == f"vlm {__version__}\n"
    assert vlm("--help") == (0, [])
    assert {"quickstart", "train", "caption", "evaluate", "config"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["caption", "a.png"], ["train", "x.yaml", "--stps=3"]])
def test_wrong_arguments(vlm: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert vlm(*arguments) == (2, [])
    assert "Usage: vlm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("runs/x holds a run"), 2, "vlm: runs/x holds a run"),
        (ConfigError(["x.yaml: a: wrong", "x.yaml: b: wrong"]), 2, "x.yaml: a: wrong\nx.yaml: b: wrong"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.tar"),
            2,
            "vlm: a.tar: No such file or directory",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.pt"), 1, "vlm: a.pt: No space left on device"),
        (OSError("something else"), 1, "vlm: something else"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(vlm: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    assert vlm("train", "x.yaml", error=error)[0] == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", message)


def test_our_own_mistakes_keep_their_traceback(vlm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        vlm("train", "x.yaml", error=AssertionError("broken"))
    monkeypatch.setenv("VLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="shown in full"):
        vlm("train", "x.yaml", error=ValueError("shown in full"))
