"""The page in a real browser, where there is one: it asks for nothing, complains of nothing, shows its pictures."""

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.eval.test_report import full_page
from vlm.eval.report import render

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")]


def drawn(folder: Path, html: str, width: int) -> tuple[Image.Image, list[str]]:
    """A screenshot, and what the console says."""
    page, shot = folder / "page.html", folder / "shot.png"
    page.write_text(html, encoding="utf-8")
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    switches += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},3000", f"--screenshot={shot}"]
    done = subprocess.run(
        [str(BROWSER), *switches, page.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB"), [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]


@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_draws_it_in_silence(tmp_path: Path, width: int) -> None:
    image, said = drawn(tmp_path, render(full_page()), width)
    colours = image.getcolors(2**24)
    assert said == [] and image.width == width and colours is not None
    assert any(red > 240 and green < 30 and blue < 30 for _, (red, green, blue) in colours)  # the pictures are red


def test_a_page_that_asked_for_something_would_be_noticed(tmp_path: Path) -> None:
    html = render(full_page()).replace("<main>", '<main><img src="https://example.invalid/x.png" alt="x">')
    _, said = drawn(tmp_path, html, 500)
    assert said and "Content Security Policy" in said[0]
