"""Samples → PNG files that a person can read, with the parameters in their text chunks."""

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
INK, FAINT, PAPER, GLOW = (24, 24, 27), (95, 95, 105), (255, 255, 255), (255, 150, 0)


def check_writable(out: Path) -> None:
    """Raises an error now, rather than after sampling, if `out` cannot be written. Makes the folders that it needs.

    Args:
        out: a .png file, or else (no ending) a folder.

    Raises:
        ValueError: another ending, or a folder that is called .png.
        OSError: it cannot be written; the message has the system's reason.

    >>> check_writable(Path("samples.jpg"))
    Traceback (most recent call last):
    ValueError: --out samples.jpg must end in .png, or be a folder (no ending) for one PNG per sample.
    """
    if out.suffix and out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} must end in .png, or be a folder (no ending) for one PNG per sample.")
    if out.suffix and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file name that ends in .png.")
    folder = out.parent if out.suffix else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}.") from error


def save(image: Image.Image, path: Path, parameters: str) -> None:
    """Writes a PNG whole or not at all, its parameters in the text chunk that image tools read ("parameters").

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


def is_whole(path: Path) -> bool:
    """Whether a PNG has its first and its last bytes, and so is not cut off. The rest is not read.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "cat.png")
    ...     save(Image.new("RGB", (8, 8)), path, "")
    ...     whole, _ = is_whole(path), os.truncate(path, path.stat().st_size - 1)
    ...     whole, is_whole(path)
    (True, False)
    """
    if path.stat().st_size < len(PNG_START) + len(PNG_END):
        return False
    with open(path, "rb") as file:
        start = file.read(len(PNG_START))
        file.seek(-len(PNG_END), os.SEEK_END)
        return (start, file.read()) == (PNG_START, PNG_END)


def free_name(path: Path) -> Path:
    """The path, or if it exists the first free one of `name-2.png`, `name-3.png`, ...

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Path(folder, "cat.png").touch()
    ...     free_name(Path(folder, "cat.png")).name
    'cat-2.png'
    """
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def to_image(sample: Tensor, scale: int = 1) -> Image.Image:
    """(c, h, w) in [-1, 1], c 1 or 3 → an RGB picture, `scale` times as large. What lies outside is clamped.

    >>> import torch
    >>> to_image(torch.zeros(3, 8, 12), scale=2).size
    (24, 16)
    """
    return enlarge(to_pil_image(((sample.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()).convert("RGB"), scale)


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """
    >>> enlarge(Image.new("RGB", (8, 12)), 2).size
    (16, 24)
    """
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS) if scale > 1 else image


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


def compare(plain: Image.Image, with_sag: Image.Image) -> Image.Image:
    """The two beside each other, labelled.

    >>> compare(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))).size
    (130, 80)
    """
    size = max(11, with_sag.width // 32)
    both, bar = grid([plain, with_sag], 2, gap=2).crop((2, 2, 2 * with_sag.width + 4, with_sag.height + 2)), size + 5
    canvas = Image.new("RGB", (both.width, both.height + bar), PAPER)
    canvas.paste(both, (0, bar))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size)
    for i, label in enumerate(("plain", "with SAG")):
        draw.text((i * (with_sag.width + 2) + with_sag.width / 2, bar / 2), label, INK, font, anchor="mm")
    return canvas


def overlay(image: Image.Image, mask: Tensor) -> Image.Image:
    """The picture in pale grey, glowing where `mask` (1, h, w) in [0, 1] is high; of the picture's size.

    >>> import torch
    >>> overlay(Image.new("RGB", (16, 16)), torch.ones(1, 4, 4)).getpixel((0, 0))
    (232, 154, 41)
    """
    grey = image.convert("L").point(lambda value: 165 + value * 0.35).convert("RGB")
    alpha = to_pil_image((mask * 191).round().byte().cpu()).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", image.size, GLOW), grey, alpha)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """White where two pictures are the same, black where they differ by a third of the range or more.

    >>> difference(Image.new("RGB", (1, 1), (200, 200, 200)), Image.new("RGB", (1, 1), (170, 170, 170))).getpixel((0, 0))
    (165, 165, 165)
    """
    return ImageChops.difference(a, b).convert("L").point(lambda value: 255 - min(255, 3 * value)).convert("RGB")


def demo(plain: Tensor, with_sag: Tensor, looked: Tensor, names: Sequence[str], settings: str) -> Image.Image:
    """Samples without and with SAG, one below the other, large; below them, small, what changed, and where the model looked.

    It lies on a white card whose corners are transparent, for light and dark pages alike.

    Args:
        plain, with_sag: (b, c, h, w) in [-1, 1].
        looked: (b, 1, h, w), the share of the steps at which a pixel was in the mask.
        names: what each sample shows.
        settings: a line at the bottom.
    """
    scale = max(1, round(192 / plain.shape[-1]))
    before, after = ([to_image(x, scale) for x in samples] for samples in (plain, with_sag))
    w, h = after[0].size
    gap, left, top = 12, 148, 64 if any(names) else 24
    small = (w - gap) // 2, h * ((w - gap) // 2) // w
    rows = [top, top + h + gap, top + 2 * (h + gap)]
    medium, little = (ImageFont.load_default(size) for size in (19, 14))
    width = left + len(names) * (w + gap) + 12
    lines = _wrapped(settings, little, width - 2 * 24)
    card = Image.new("RGB", (width, rows[2] + small[1] + 40 + 18 * len(lines)), PAPER)
    draw = ImageDraw.Draw(card)
    draw.text((24, rows[0] + h / 2), "plain", INK, medium, anchor="lm")
    draw.text((24, rows[1] + h / 2), "with SAG", INK, medium, anchor="lm")
    label = "what changed\n(dark), where\nthe model looked\n(orange)"
    draw.multiline_text((24, rows[2] + small[1] / 2), label, FAINT, little, anchor="lm", spacing=5)
    for i, name in enumerate(names):
        x = left + i * (w + gap)
        title = "\n".join(_wrapped(name, little, w))
        draw.multiline_text((x + w / 2, top - 10), title, FAINT, little, anchor="md", align="center")
        card.paste(before[i], (x, rows[0]))
        card.paste(after[i], (x, rows[1]))
        for j, image in enumerate((difference(before[i], after[i]), overlay(after[i], looked[i]))):
            card.paste(image.resize(small, Image.Resampling.LANCZOS), (x + j * (small[0] + gap), rows[2]))
    draw.multiline_text((24, card.height - 18), "\n".join(lines), FAINT, little, anchor="ld", spacing=4)
    return _on_card(card)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """The text's words in lines of at most so many pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def _on_card(image: Image.Image, radius: int = 14) -> Image.Image:
    """Its corners rounded and transparent, with a thin edge."""
    mask = Image.new("L", (image.width * 4, image.height * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius * 4, fill=255)
    ImageDraw.Draw(image).rounded_rectangle((0, 0, image.width - 1, image.height - 1), radius, outline=(225, 225, 230))
    image.putalpha(mask.resize(image.size, Image.Resampling.LANCZOS))
    return image
