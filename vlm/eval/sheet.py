"""A contact sheet: pictures in a grid with their captions below."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIDE, MARGIN = 4, 240, 16  # pictures in a row; pixels
LINES = 5  # of a caption; the rest is cut
_PAPER, _MAT, _INK, _FAINT = "#f4f4f2", "#e4e4e0", "#1c1c1c", "#77776f"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """One picture (None: it could not be read), its key and its captions."""

    key: str
    captions: list[str]
    image: Image.Image | None


def draw(cells: Sequence[Cell], columns: int = COLUMNS) -> Image.Image:
    """The sheet as RGB; each row is as high as its longest caption needs."""
    columns = min(columns, len(cells))
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    texts = [[wrap(" / ".join(cell.captions), font, SIDE) for cell in row] for row in rows]
    heights = [SIDE + 26 + 20 * max(map(len, row)) + MARGIN for row in texts]
    sheet = Image.new("RGB", (MARGIN + columns * (SIDE + MARGIN), MARGIN + sum(heights)), _PAPER)
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for column, (cell, text) in enumerate(zip(row, lines, strict=True)):
            left = MARGIN + column * (SIDE + MARGIN)
            pen.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=_MAT)
            if cell.image is not None:
                fitted = _fit(cell.image)
                sheet.paste(fitted, (left + (SIDE - fitted.width) // 2, top + (SIDE - fitted.height) // 2))
            pen.text((left, top + SIDE + 6), wrap(cell.key, small, SIDE, 1)[0], _FAINT, small)
            for number, line in enumerate(text):
                pen.text((left, top + SIDE + 24 + 20 * number), line, _INK, font)
        top += height
    return sheet


def _fit(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, font: Font, width: int, most: int = LINES) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, and inside words that are longer; "…" where text is cut."""
    lines, line = list[str](), ""
    for word in text.split(" "):
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        lines += [line] if line else []
        line = ""
        for letter in word:
            if font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
        if len(lines) > most:
            break
    lines.append(line)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]
