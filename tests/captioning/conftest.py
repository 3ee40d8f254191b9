"""Runs that write captions, and pictures for them."""

from pathlib import Path

import pytest

from tests.tiny import COLOURS, learned, picture


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that have learned eight colours, and a picture of each."""
    folder = tmp_path_factory.mktemp("runs")
    learned(folder, "clip", "qformer", "decoder")
    pictures(folder / "pictures")
    return folder


def pictures(folder: Path) -> Path:
    """Eight squares, two of them in a folder below."""
    (folder / "more").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        (folder / ("more" if i > 5 else "") / f"{colour}.png").write_bytes(picture(colour))
    (folder / "notes.txt").write_text("no picture")
    return folder
