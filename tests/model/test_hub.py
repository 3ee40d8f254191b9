"""Checkpoints by path and by name: from a hub on this machine, from its cache, and refused in one line."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from tests.model.hub_site import COMMIT, Hub, cached, serving
from vlm.model.published.hub import find, pinned, read_json, wanted
from vlm.model.weights.source import open_weights

ROOT = Path(__file__).parents[2]
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": save({"weight": torch.ones(2)})}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "cache"


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No connection can be made; each attempt is noted."""
    tried = list[str]()

    def refuse(*address: object, **_: object) -> None:
        tried.append(str(address))
        raise OSError("the network is blocked")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that answers."""
    with serving() as site:
        monkeypatch.setattr(constants, "ENDPOINT", site.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield site


def test_a_path_is_taken_as_it_is_and_needs_no_network(tmp_path: Path, blocked: list[str]) -> None:
    (tmp_path / "owner" / "name@main").mkdir(parents=True)
    (tmp_path / "w.pth").touch()
    for path in (tmp_path, tmp_path / "owner" / "name@main", tmp_path / "w.pth"):
        assert find(path) == find(str(path)) == path
        assert pinned(path) == str(path)
    with pytest.raises(ValueError, match=r"w\.pth lies on this disk: a revision \(v1\) is for names on the hub$"):
        find(tmp_path / "w.pth", "v1")
    assert blocked == []


@pytest.mark.parametrize(
    "name", ["missing", "./a/b", "/a/b", "a/b/c", "a/../b", "a--b/c", "a/b@", "a b/c", "", "a/b@x@y"]
)
def test_neither_a_path_nor_a_name(name: str, blocked: list[str]) -> None:
    with pytest.raises(ValueError, match=r"is neither a file or folder nor a name on the hub") as told:
        find(name)
    assert len(str(told.value).splitlines()) == 1 and blocked == []


@pytest.mark.parametrize(
    ("name", "revision"), [("o/n", None), ("o/n", "main"), ("o/n@main", None), (f"o/n@{COMMIT}", None)]
)
def test_the_cache_alone_where_offline_is_asked_for(
    cache: Path, offline: None, blocked: list[str], name: str, revision: str | None
) -> None:
    folder = cached(cache, "o/n", FILES)
    path = find(name, revision)
    assert path.samefile(folder) and blocked == []
    assert pinned(path) == f"o/n@{COMMIT}" and pinned(path / "w.pth") == f"o/n@{COMMIT}/w.pth"
    assert find(pinned(path)) == path
    assert open_weights(path).read("weight").tolist() == [1, 1]
    assert read_json(path, "config.json") == {"model_type": "llama"}


def test_offline_and_not_in_the_cache(cache: Path, offline: None, blocked: list[str]) -> None:
    cached(cache, "o/n", FILES)
    for name in ("o/other", "o/n@v2"):
        with pytest.raises(ValueError) as told:
            find(name)
        assert str(told.value) == (
            f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset that, or download it "
            "elsewhere and give the folder in place of the name"
        )
    assert blocked == []


def test_without_a_network_the_cache_is_used_and_told(
    cache: Path, blocked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    cached(cache, "o/n", FILES)
    with caplog.at_level(logging.WARNING):
        assert pinned(find("o/n")) == f"o/n@{COMMIT}"
    assert blocked
    assert f"warning: the hub gave no answer for o/n; using o/n@{COMMIT} from the cache" in caplog.messages
    with pytest.raises(ValueError) as told:
        find("o/other")
    assert str(told.value) == (
        "o/other is not in the hub's cache, and the hub is out of reach (the network is blocked): look at the network, "
        "or download it elsewhere and give the folder in place of the name"
    )


def test_fetched_from_a_hub_and_then_from_the_cache(hub: Hub, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories["o/n"] = {**FILES, "tokenizer.json": b"{}", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x"}
    path = find("o/n")
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert pinned(path) == f"o/n@{COMMIT}"
    assert open_weights(path).read("weight").tolist() == [1, 1]
    assert find("o/n", "v1") == find(f"o/n@{COMMIT}") == path
    assert len(hub.fetched) == 3
    hub.repositories.clear()
    assert find("o/n") == path
    assert "the hub gave no answer for o/n" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find("o/n") == path and find("o/n@v1") == path


def test_what_a_hub_refuses(hub: Hub) -> None:
    hub.repositories |= {"o/n": FILES, "o/gated": FILES}
    hub.gated.add("o/gated")
    rest = "or download it elsewhere and give the folder in place of the name"
    for name, message in {
        "o/gated": f"o/gated is gated: accept its terms at {hub.url}/o/gated, log in (hf auth login), {rest}",
        "o/absent": "o/absent is no folder here, and not on the hub or private there: compare its name, log in "
        f"(hf auth login), {rest}",
        "o/n@v9": "o/n has no revision 'v9' on the hub: name a branch, a tag or a commit",
    }.items():
        with pytest.raises(ValueError) as told:
            find(name)
        assert str(told.value) == message
    with pytest.raises(ValueError, match="names a revision already: give v1 in one place"):
        find("o/n@main", "v1")


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], ["model.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "model.fp16-00001-of-00002.safetensors"],
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["pytorch_model.bin", "training_args.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
        ),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], ["open_clip_model.safetensors"]),
        (["blip2_pretrained.pth", "model.gguf"], ["blip2_pretrained.pth"]),
        (["original/consolidated.00.pth", "model.msgpack"], []),
    ],
)  # fmt: skip
def test_one_set_of_weights_is_fetched(names: list[str], weights: list[str]) -> None:
    small = ["config.json", "vocab.txt", "spiece.model", "chat_template.jinja"]
    assert wanted([*small, *names, "README.md", "1_Pooling/config.json"]) == [*small, *weights]


def test_the_variable_alone_keeps_from_the_network(tmp_path: Path) -> None:
    cached(tmp_path / "hub", "o/n", FILES)
    code = (
        "import socket, sys\n"
        "def no(*_, **__): sys.exit('network')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = no\n"
        "from vlm.model.published.hub import find, pinned\n"
        "print(pinned(find('o/n')))\n"
        "try: find('o/other')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == f"o/n@{COMMIT}"
    assert second.startswith("o/other is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset that,")


def test_settings_in_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert read_json(tmp_path, "config.json") == {"hidden_size": 8}
