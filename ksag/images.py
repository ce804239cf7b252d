"""Samples → PNG files with their parameters in text chunks."""

import itertools
import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

INK, FAINT, PAPER = (24, 24, 27), (95, 95, 105), (255, 255, 255)


def check_writable(out: Path) -> None:
    """Raises an error before sampling if `out`, a .png file or a folder (no ending), cannot be written. Creates its folders.

    >>> check_writable(Path("samples.jpg"))
    Traceback (most recent call last):
    ValueError: --out samples.jpg must be a file that ends in .png, or a folder (no ending) with a PNG per sample.
    """
    if out.suffix and (out.suffix.lower() != ".png" or out.is_dir()):
        raise ValueError(f"--out {out} must be a file that ends in .png, or a folder (no ending) with a PNG per sample.")
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}.") from error


def save(image: Image.Image, path: Path, parameters: str) -> None:
    """Writes a PNG with its parameters in the text chunk "parameters", which image tools read. The file is never incomplete.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Image.new("RGB", (8, 8)), Path(folder, "cat.png"), "a cat\\nSteps: 20")
    ...     print(Image.open(Path(folder, "cat.png")).text["parameters"])
    a cat
    Steps: 20
    """
    info = PngInfo()
    info.add_text("parameters", parameters)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


def free_name(path: Path) -> Path:
    """The path, or if it exists the first free one of `name-2.png`, `name-3.png`, ...

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "cat.png").touch()
    ...     free_name(Path(folder, "cat.png")).name
    'cat-2.png'
    """
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def to_image(sample: Tensor) -> Image.Image:
    """(c, h, w) in [-1, 1], c 1 or 3 → an RGB picture. Other values are clamped.

    >>> import torch
    >>> to_image(torch.zeros(3, 8, 12)).size
    (12, 8)
    """
    image: Image.Image = to_pil_image(((sample.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return image.convert("RGB")


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size → one picture of rows of `columns`, on white, `gap` pixels apart.

    >>> grid([Image.new("RGB", (8, 8))] * 4, columns=2).size
    (22, 22)
    """
    columns = min(columns, len(images))
    w, h = images[0].width + gap, images[0].height + gap
    canvas = Image.new("RGB", (columns * w + gap, -(-len(images) // columns) * h + gap), PAPER)
    for i, image in enumerate(images):
        canvas.paste(image, (gap + i % columns * w, gap + i // columns * h))
    return canvas


def compare(plain: Image.Image, guided: Image.Image, label: str) -> Image.Image:
    """Both pictures in one, labelled "plain" and `label`.

    >>> compare(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64)), "SAG").size
    (130, 80)
    """
    size = max(11, guided.width // 32)
    both, bar = grid([plain, guided], 2, gap=2).crop((2, 2, 2 * guided.width + 4, guided.height + 2)), size + 5
    canvas = Image.new("RGB", (both.width, both.height + bar), PAPER)
    canvas.paste(both, (0, bar))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for i, text in enumerate(("plain", label)):
        draw.text((i * (guided.width + 2) + guided.width / 2, bar / 2), text, INK, font, anchor="mm")
    return canvas


def demo(rows: Sequence[tuple[str, Tensor]], names: Sequence[str], title: str, settings: str) -> Image.Image:
    """Samples from the same noise in one picture, a row for each way of sampling.

    Args:
        rows: a label and its samples, (b, c, h, w) in [-1, 1]. The label's first line is a heading, the rest explains it.
        names: what each sample shows, above its column.
        title: a line at the top.
        settings: a line at the bottom.
    """
    zoom = max(1, round(192 / rows[0][1].shape[-1]))
    pictures = [[ImageOps.scale(to_image(x), zoom, Image.Resampling.LANCZOS) for x in samples] for _, samples in rows]
    w, h = pictures[0][0].size
    large, medium, small = (ImageFont.load_default(size) for size in (22, 15, 13))
    margin, gap, left = 24, 12, 212
    width = left + len(names) * (w + gap) + margin
    title, settings = _wrapped(title, large, width - 2 * margin), _wrapped(settings, small, width - 2 * margin)
    columns = [_wrapped(name, small, w) for name in names]
    top = margin + 28 * (title.count("\n") + 1) + 17 * (max(column.count("\n") for column in columns) + 1) + 2 * gap
    card = Image.new("RGB", (width, top + len(rows) * (h + gap) + 18 * (settings.count("\n") + 1) + margin), PAPER)
    draw = ImageDraw.Draw(card)
    draw.multiline_text((margin, margin), title, INK, large)
    for i, column in enumerate(columns):
        draw.multiline_text((left + i * (w + gap) + w / 2, top - 8), column, FAINT, small, anchor="md", align="center")
    for (label, _), images, y in zip(rows, pictures, range(top, card.height, h + gap), strict=False):
        heading, _, explanation = label.partition("\n")
        draw.text((margin, y + h / 2 - 18), heading, INK, large, anchor="lm")
        draw.multiline_text((margin, y + h / 2), _wrapped(explanation, medium, left - margin - gap), FAINT, medium)
        for i, image in enumerate(images):
            card.paste(image, (left + i * (w + gap), y))
    draw.multiline_text((margin, card.height - margin), settings, FAINT, small, anchor="ld")
    return card


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """In lines of about that many pixels, by the mean width of the text's letters."""
    letter = max(1, font.getlength(text)) / max(1, len(text))
    return textwrap.fill(text, max(1, int(0.9 * width / letter)), break_on_hyphens=False)
