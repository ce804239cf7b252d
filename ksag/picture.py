"""Samples → PNG files that a person can read, with the parameters in their text chunks."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torchvision
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

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
    part = path.with_name(f".{path.name}.part")
    image.save(part, format="PNG", pnginfo=info)
    os.replace(part, path)


def to_image(sample: Tensor, scale: int = 1) -> Image.Image:
    """(c, h, w) in [-1, 1], c 1 or 3 → an RGB picture, `scale` times as large. What lies outside is clamped.

    >>> import torch
    >>> to_image(torch.zeros(3, 8, 12), scale=2).size
    (24, 16)
    """
    image = to_pil_image(((sample.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()).convert("RGB")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS) if scale > 1 else image


def grid(samples: Tensor, columns: int) -> Image.Image:
    """(b, c, h, w) in [-1, 1] → one RGB picture of rows of `columns` samples, on white, 2 pixels apart.

    >>> import torch
    >>> grid(torch.zeros(4, 3, 8, 8), columns=2).size
    (22, 22)
    """
    return to_image(torchvision.utils.make_grid(samples.float().cpu(), nrow=columns, padding=2, pad_value=1.0))


def overlay(image: Image.Image, mask: Tensor) -> Image.Image:
    """The picture in dim grey, glowing where `mask` (1, h, w) in [0, 1] is high; of the picture's size.

    >>> import torch
    >>> overlay(Image.new("RGB", (16, 16)), torch.ones(1, 4, 4)).getpixel((0, 0))
    (191, 112, 0)
    """
    grey = image.convert("L").point(lambda value: value * 0.6).convert("RGB")
    alpha = to_pil_image((mask * 191).round().byte().cpu()).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", image.size, GLOW), grey, alpha)


def demo(plain: Tensor, with_sag: Tensor, looked: Tensor, names: Sequence[str], settings: str) -> Image.Image:
    """Samples without and with SAG (b, c, h, w) in [-1, 1], what changed, and `looked` (b, 1, h, w), the share of the
    steps at which a pixel was in the mask: a row each, a column per sample.
    """
    scale = 5
    changed = [to_image((b - a) * 2, scale) for a, b in zip(plain, with_sag, strict=True)]
    pictures = [to_image(x, scale) for x in with_sag]
    masks = [overlay(p, m) for p, m in zip(pictures, looked, strict=True)]
    rows = [
        ("plain", "guidance by class only", [to_image(x, scale) for x in plain]),
        ("with SAG", "the same noise", pictures),
        ("what changed", "the difference,\ndoubled", changed),
        ("where it looked", "the mask: brightest\nif held at every step", masks),
    ]
    w, h = pictures[0].size
    gap, left, top = 6, 184, 96
    canvas = Image.new("RGB", (left + len(names) * (w + gap) + 14, top + len(rows) * (h + gap) + 14), PAPER)
    draw = ImageDraw.Draw(canvas)
    large, medium, small = (ImageFont.load_default(size) for size in (24, 18, 14))
    draw.text((20, 14), "Self-Attention Guidance in k-diffusion", INK, large)
    draw.text((20, 48), settings, FAINT, small)
    for i, name in enumerate(names):
        draw.text((left + i * (w + gap) + w / 2, top - 10), name, INK, small, anchor="ms")
    for j, (label, note, images) in enumerate(rows):
        y = top + j * (h + gap)
        draw.text((20, y + h / 2 - 6), label, INK, medium, anchor="lb")
        draw.multiline_text((20, y + h / 2), note, FAINT, small, spacing=3)
        for i, image in enumerate(images):
            canvas.paste(image, (left + i * (w + gap), y))
    return canvas
