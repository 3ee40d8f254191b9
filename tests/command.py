"""The command line as a process of its own, quickly: one process imports everything once and forks for every command.

What a command sees is what `python -m vlm` sees: its arguments, folder, standard input and output, signals, exit code.
"""

import errno
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parent.parent
NO_NETWORK = "TEST_NO_NETWORK"
STREAMS = ("stdin", "stdout", "stderr")


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
        self,
        *arguments: object,
        folder: Path,
        stdin: str = "",
        meanwhile: Callable[[int, Path], None] | None = None,
        network: Literal["open", "down", "forbidden"] = "open",
    ) -> Done:
        """`meanwhile` gets the process's id and the file that its standard error goes to.

        `network`: "down": nothing can be reached; "forbidden": a command that tries ends with code 99.
        """

        def first(processes: list[int], errors: Path) -> None:
            if meanwhile is not None:
                meanwhile(processes[0], errors)

        environment = {} if network == "open" else {NO_NETWORK: network}
        return self._run([environment], *arguments, folder=folder, stdin=stdin, meanwhile=first)[0]

    def together(
        self,
        count: int,
        *arguments: object,
        folder: Path,
        machines: int = 1,
        meanwhile: Callable[[list[int], Path], None] | None = None,
    ) -> list[Done]:
        """As `count` processes of one run, which is what torchrun does; `meanwhile` gets the first one's errors."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
        local = count // machines
        ranks = [
            meet | {"RANK": str(i), "LOCAL_RANK": str(i % local), "LOCAL_WORLD_SIZE": str(local)} for i in range(count)
        ]
        return self._run([meet | rank for rank in ranks], *arguments, folder=folder, stdin="", meanwhile=meanwhile)

    def _run(
        self,
        environments: list[dict[str, str]],
        *arguments: object,
        folder: Path,
        stdin: str,
        meanwhile: Callable[[list[int], Path], None] | None,
    ) -> list[Done]:
        files = [{name: self._scratch / f"{name}-{i}" for name in STREAMS} for i in range(len(environments))]
        for each in files:
            for name, file in each.items():
                file.write_text(stdin if name == "stdin" else "", encoding="utf-8")
        processes = [
            {"environment": environment, **{name: str(file) for name, file in each.items()}}
            for environment, each in zip(environments, files, strict=True)
        ]
        request = {"arguments": [str(a) for a in arguments], "folder": str(folder), "processes": processes}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        started = self._answer()
        if meanwhile is not None:
            meanwhile(started, files[0]["stderr"])
        codes = self._answer()
        told = [[each[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")] for each in files]
        return [Done(code, *texts) for code, texts in zip(codes, told, strict=True)]

    def _answer(self) -> list[int]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the process that runs the commands has ended"
        found: list[int] = json.loads(line)
        return found


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
    for name in ("vlm.train.run", "vlm.eval.run", "vlm.captioning.run"):  # what takes seconds to import
        importlib.import_module(name)
    for line in sys.stdin:
        request, processes = json.loads(line), list[int]()
        for own in request.pop("processes"):
            processes.append(os.fork())
            if processes[-1] == 0:
                _become(request | own)
        print(json.dumps(processes), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in processes]), flush=True)


def _refuse_networks(how: str) -> Callable[[str, tuple[object, ...]], None]:
    """Python tells of every name that is looked up and every connection, whoever asks."""

    def hook(event: str, _: tuple[object, ...]) -> None:
        if event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            return
        if how == "down":
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        os.write(2, f"the command reached for a network: {event}\n".encode())
        os._exit(99)

    return hook


def _become(request: dict[str, Any]) -> None:
    os.environ.update(request["environment"])
    for number, (name, flags) in enumerate((("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY))):
        os.dup2(os.open(request[name], flags), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")  # the parent's has read ahead
    os.chdir(request["folder"])
    if NO_NETWORK in request["environment"]:
        sys.addaudithook(_refuse_networks(request["environment"][NO_NETWORK]))
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
