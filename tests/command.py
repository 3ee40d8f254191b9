"""The command line as a process of its own, quickly: one process imports everything once and forks for every command.

What a command sees is what `python -m vlm` sees: its arguments, folder, standard input and output, signals, exit code.
"""

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """Runs `vlm` with arguments in `folder`, one command at a time."""

    def __init__(self, server: "subprocess.Popen[str]", scratch: Path) -> None:
        self._server, self._scratch = server, scratch

    def __call__(
        self, *arguments: object, folder: Path, stdin: str = "", meanwhile: Callable[[int, Path], None] | None = None
    ) -> Done:
        """`meanwhile` gets the process's id and the file that its standard error goes to."""
        files = {name: self._scratch / name for name in ("stdin", "stdout", "stderr")}
        for name, file in files.items():
            file.write_text(stdin if name == "stdin" else "", encoding="utf-8")
        request = {
            "arguments": [str(a) for a in arguments],
            "folder": str(folder),
            **{k: str(v) for k, v in files.items()},
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        process = self._answer()
        if meanwhile is not None:
            meanwhile(process, files["stderr"])
        code = self._answer()
        return Done(code, files["stdout"].read_text(encoding="utf-8"), files["stderr"].read_text(encoding="utf-8"))

    def _answer(self) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process that runs the commands has ended"
        return int(line)


@contextmanager
def commands(scratch: Path) -> Iterator[Commands]:
    """The forking process, ended at the end."""
    code = "from tests.command import serve; serve()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        yield Commands(server, scratch)
        assert server.stdin is not None
        server.stdin.close()


def wait_for(file: Path, text: str, seconds: float = 60) -> None:
    """Until the file holds the text."""
    end = time.monotonic() + seconds
    while text not in file.read_text(encoding="utf-8"):
        assert time.monotonic() < end, f"no {text!r} in {file.read_text(encoding='utf-8')!r}"
        time.sleep(0.005)


def serve() -> None:
    """Forks for each request on standard input; answers with the process's id, and with its exit code at the end."""
    for name in ("vlm.train.run", "vlm.eval.run"):  # what takes seconds to import
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _become(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))):
        os.dup2(os.open(request[name], flags), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")  # the parent's has read ahead
    os.chdir(request["folder"])
    sys.argv = ["vlm", *request["arguments"]]
    code = 0
    try:
        runpy.run_module("vlm", run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
