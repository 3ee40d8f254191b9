"""Shards by address on the real command line: every verb reads them, and no command runs unless a flag allows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Commands, commands
from tests.data.web import Site, serving
from tests.tiny import records, settings, squares, write_config


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        with commands(tmp_path_factory.mktemp("commands")) as runner:
            yield runner


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with serving() as found:
        for i in range(2):
            found.files[f"/{i}.tar"] = squares(folder / f"{i}.tar", 8, prefix=f"s{i}-").read_bytes()
        yield found


def test_every_verb_reads_addresses(vlm: Commands, site: Site, tmp_path: Path) -> None:
    shards = site.url + "/{0..1}.tar"
    given = settings("clip", Path("x"), steps=3, save_every=3)
    given["data"] |= {"train": shards, "val": shards, "workers": 1}
    config = write_config(tmp_path / "clip.yaml", given)

    def done(*arguments: object) -> str:
        found = vlm(*arguments, folder=tmp_path)
        assert found.code == 0, found.err
        return found.out

    done("train", config, "data.shard_cache=one", "--out", "run")
    done("train", config, "data.shard_cache=two", "data.shard_cache_gb=1", "--out", "run", "--resume")
    assert len(list((tmp_path / "two").rglob("*.tar"))) == 2
    assert "16 images, 16 captions" in done("evaluate", shards, "--model", "run")
    assert "0 of 16 samples in 2 shards are unusable" in done("shards", "check", shards)
    assert "12 pictures with their captions" in done("shards", "preview", shards, "--config", config)
    assert "16 pictures with 16 captions in 1 shards" in done("shards", "write", shards, "written")
    frozen = ("model.vision.frozen=true", "model.init.vision=run", "data.val=null", "data.shard_cache=one")
    assert '"samples": 16' in done("shards", "features", config, "kept", *frozen)
    local = settings("clip", Path(tmp_path / "written"), steps=3)
    local["data"]["val"] = local["data"]["train"]
    done("train", write_config(tmp_path / "local.yaml", local), "--out", "local")
    assert [line["step"] for line in records(tmp_path / "local")] == [
        line["step"] for line in records(tmp_path / "run")
    ]
    assert site.asked["/0.tar"] == 3  # once for each cache: one, two, $VLM_CACHE


def test_a_command_in_a_config_is_never_run(vlm: Commands, tmp_path: Path) -> None:
    squares(tmp_path / "s.tar")
    pipe = "pipe:touch marker; cat s.tar"
    config = write_config(tmp_path / "clip.yaml", settings("clip", Path(pipe)))
    for arguments in (
        ("train", config),
        ("train", config, "--overfit", 4),
        ("shards", "check", pipe),
        ("shards", "check", "s.tar", pipe),
        ("shards", "preview", pipe),
        ("shards", "write", pipe, "out"),
    ):
        done = vlm(*arguments, folder=tmp_path)
        assert (done.code, done.out) == (2, "") and "would run a command in a shell" in done.err, done.err
        assert "--allow-pipe (no config can)" in done.err and "Traceback" not in done.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.yaml", "s.tar"]
    done = vlm("train", config, "allow_pipe=true", folder=tmp_path)
    assert done.code == 2 and "allow_pipe: no such setting" in done.err


def test_a_command_is_run_where_a_flag_allows_it(vlm: Commands, tmp_path: Path) -> None:
    squares(tmp_path / "s.tar")
    config = write_config(tmp_path / "clip.yaml", settings("clip", Path("pipe:touch marker; cat s.tar")))
    done = vlm("train", config, "data.workers=1", "--allow-pipe", "--out", "run", folder=tmp_path)
    assert done.code == 0 and (tmp_path / "marker").exists()
    assert "--allow-pipe: running in a shell: touch marker; cat s.tar" in done.err
    assert "in a shell" in vlm("train", "--help", folder=tmp_path).out


@pytest.mark.parametrize(
    "verb", [["train"], ["evaluate"], *(["shards", name] for name in ("check", "preview", "write", "features"))]
)
def test_the_flag_says_what_it_does(vlm: Commands, tmp_path: Path, verb: list[str]) -> None:
    text = " ".join(vlm(*verb, "--help", folder=tmp_path).out.split())
    assert "--allow-pipe For shards named pipe:COMMAND, run COMMAND in a shell" in text


def test_an_address_that_leads_nowhere(vlm: Commands, site: Site, tmp_path: Path) -> None:
    config = write_config(tmp_path / "clip.yaml", settings("clip", Path("x")))
    done = vlm("train", config, f"data.train={site.url}/{{0..2}}.tar", folder=tmp_path)
    message = f"vlm: {site.url}/2.tar: the server answers 404 Not Found; look at the address and its braces\n"
    assert (done.code, done.out, done.err) == (2, "", message)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.yaml"]
