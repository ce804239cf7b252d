"""Which pictures does `train_emoji.py` train on?  Emoji in seven styles, rendered from the SVGs of npm packages:

    npm install @iconify-json/{noto,noto-v1,fluent-emoji,fluent-emoji-flat,fxemoji,twemoji,emojione}
    pip install resvg_py
    python scripts/make_emoji.py --packages node_modules --out emoji

It writes one lossless WebP sheet a style, and `index.json`: size, categories, columns of the sheets, each package's version
and licence, and of each sheet's pictures, row by row, the name, emoji, category, whether it may be mirrored, and whether
it is held out. Flags, skin tones other than the neutral one, and icons that their package hides or leaves blank are left out.

An emoji is held out in all styles or in none. Names that mean the same emoji are joined: by what the packages say of
code points and aliases, by Unicode's own names, and for fxemoji, which has names of its own, by `fxemoji_names.json`. So
are a man, a woman and a person who do the same, the clock faces, the families, and pictures that hardly differ.
"""

import hashlib
import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

STYLES = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji", "twemoji", "emojione")
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)
OTHER_CATEGORIES = {  # of fxemoji and emojione, for emoji that no other package has
    "People": "People & Body",
    "Nature": "Animals & Nature",
    "Food": "Food & Drink",
    "Travel": "Travel & Places",
    "Places": "Travel & Places",
}
LEFT_OUT = ("Flags", "Modifiers")
SAME_NAMES = {"fluent-emoji": "fluent-emoji-flat"}  # it comes with no metadata of its own
OWN_NAMES = {"fxemoji": Path(__file__).with_name("fxemoji_names.json")}
SKIN_TONE = re.compile(r"skin-tone|-tone\d")
FLUENT_SKIN_TONE = re.compile(r"(-(medium-)?(dark|light|medium))+$")
PEOPLE = re.compile(r"\b(man|men|woman|women|person|people|and|facing|right)\b")
CLOCK = re.compile(r"^clock\d|(oclock|thirty)$")
WRITTEN = re.compile(
    r"\d|abc|arrow|atm|bank|book|button|calendar|card|chart|clock|coin|compass|currency|dollar|dvd|e-?mail|euro|exclamation|floppy|"
    r"globe|hotel|hour|hundred|input|keyboard|keycap|label|map|medal|memo|money|music|news|page|phone|place|pound|question|receipt|"
    r"ruler|school|score|shibuya|sign|slot|stop|store|taxi|thermometer|thirty|ticket|video|watch|yen|zzz"
)
SIZE, COLUMNS, HELD_OUT = 64, 40, 0.05
BLANK = 0.02  # rms difference from white, of pixels in [0, 1], below which there is no picture to see
NEAR = 0.05  # rms difference below which two pictures are of one emoji


@dataclass(frozen=True)
class Picture:
    name: str
    emoji: str
    category: str
    mirror: bool
    held_out: bool


@dataclass(frozen=True)
class Package:
    style: str
    icons: dict
    categories: dict[str, str]
    chars: dict[str, str]
    info: dict

    @property
    def names(self) -> list[str]:
        return [name for name in self.icons["icons"] if self.is_wanted(name)]

    def is_wanted(self, name: str) -> bool:
        icons = self.icons["icons"]
        base = FLUENT_SKIN_TONE.sub("", name)
        toned = SKIN_TONE.search(name) or (base != name and base in icons)
        return not (toned or icons[name].get("hidden") or self.categories.get(name, "Flags") in LEFT_OUT)

    def svg(self, name: str) -> str:
        icon = {"left": 0, "top": 0, "width": 16, "height": 16} | self.icons | self.icons["icons"][name]
        box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
        )


class Groups:
    """A partition that grows by joining (union-find). A group is called by the first of its members in the alphabet."""

    def __init__(self) -> None:
        self.parents: dict[str, str] = {}

    def find(self, member: str) -> str:
        while (parent := self.parents.setdefault(member, member)) != member:
            member = parent
        return member

    def join(self, a: str, b: str) -> None:
        first, second = sorted((self.find(a), self.find(b)))
        self.parents[second] = first


def read_package(packages: Path, style: str) -> Package:
    folder = packages / "@iconify-json" / style
    named = packages / "@iconify-json" / SAME_NAMES.get(style, style)
    categories = json.loads((named / "metadata.json").read_text())["categories"]
    return Package(
        style,
        json.loads((folder / "icons.json").read_text()),
        {name: category for category, names in categories.items() for name in names},
        json.loads((named / "chars.json").read_text()),
        json.loads((folder / "info.json").read_text()) | json.loads((folder / "package.json").read_text()),
    )


def plain(name: str) -> str:
    """`Slice of Pizza`, `slice-of-pizza` and `sliceofpizza` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def without_people(name: str) -> str:
    """`man-artist`, `woman-artist` and `artist` are one emoji; so are all families, and all clock faces."""
    if name.startswith("family"):
        return "family"
    if CLOCK.search(name):
        return "clock face"
    return re.sub(r"-+", "-", PEOPLE.sub("", name)).strip("-") or name


def unicode_name(code_points: str) -> str | None:
    """Unicode's name of an emoji of one code point, such as `1f355` or `2764-fe0f`."""
    characters = [chr(int(code, 16)) for code in code_points.split("-") if code != "fe0f"]
    return unicodedata.name(characters[0], None) if len(characters) == 1 else None


def group_names(packages: list[Package]) -> Groups:
    groups = Groups()
    for package in packages:
        own = json.loads(OWN_NAMES[package.style].read_text()) if package.style in OWN_NAMES else {}
        for name in package.names:
            groups.join(plain(name), plain(own.get(name, name)))
            groups.join(plain(name), plain(without_people(name)))
        for alias, icon in package.icons.get("aliases", {}).items():
            groups.join(plain(alias), plain(icon["parent"]))
        for code_points, name in package.chars.items():
            if title := unicode_name(code_points):
                groups.join(plain(title), plain(name))
    return groups


def render(svg: str) -> np.ndarray:
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", width=SIZE, height=SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def reals(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def near_pairs(images: np.ndarray, limit: float, block: int = 500) -> Iterator[tuple[int, int]]:
    """The pairs of pictures whose rms difference is below the limit."""
    pixels = reals(images)
    squares = (pixels**2).mean(1)
    for start in range(0, len(pixels), block):
        rows = slice(start, start + block)
        distances = squares[rows, None] + squares - 2 * (pixels[rows] @ pixels.T) / pixels.shape[1]
        for a, b in zip(*np.nonzero(distances < limit**2), strict=True):
            if start + a < b:
                yield start + a, b


def is_held_out(emoji: str) -> bool:
    digest = hashlib.sha256(emoji.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def describe(names: list[tuple[Package, str]], groups: Groups) -> list[Picture]:
    """What is known of each picture; the category is its own where it is one of Unicode's, else that of most of its emoji."""
    emoji = [groups.find(plain(name)) for _, name in names]
    own = [package.categories[name] for package, name in names]
    votes: dict[str, Counter] = defaultdict(Counter)
    for which, (package, _), category in zip(emoji, names, own, strict=True):
        votes[which][category] += package.style not in ("fxemoji", "emojione") and category in CATEGORIES
    written = {which for which, (_, name) in zip(emoji, names, strict=True) if WRITTEN.search(name)}
    pictures = []
    for which, (package, name), category in zip(emoji, names, own, strict=True):
        most, count = votes[which].most_common(1)[0]
        if package.style in ("fxemoji", "emojione") or category not in CATEGORIES:
            category = most if count else OTHER_CATEGORIES.get(category, category)
        mirror = category != "Symbols" and which not in written
        pictures.append(Picture(name, which, category, mirror, is_held_out(which)))
    return pictures


def sheet(images: np.ndarray) -> Image.Image:
    """The pictures row by row, the last row filled up with white."""
    rows = -(-len(images) // COLUMNS)
    full = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    full[: len(images)] = images
    return Image.fromarray(full.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 3))


@click.command(help=__doc__)
@click.option("--packages", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="node_modules.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("emoji"), show_default=True)
def main(packages: Path, out: Path) -> None:
    read = [read_package(packages, style) for style in STYLES]
    names = [(package, name) for package in read for name in package.names]
    with ProcessPoolExecutor() as pool:
        svgs = [package.svg(name) for package, name in names]
        images = np.stack(list(tqdm(pool.map(render, svgs, chunksize=32), desc="rendering", total=len(svgs))))

    seen = np.sqrt(((1 - reals(images)) ** 2).mean(1)) >= BLANK
    images, names = images[seen], [name for name, there in zip(names, seen, strict=True) if there]
    groups = group_names(read)
    for a, b in near_pairs(images, NEAR):
        groups.join(plain(names[a][1]), plain(names[b][1]))
    pictures = describe(names, groups)

    out.mkdir(parents=True, exist_ok=True)
    styles = np.array([package.style for package, _ in names])
    for style in STYLES:
        sheet(images[styles == style]).save(out / f"{style}.webp", lossless=True, quality=100, method=4)
    index = {
        "size": SIZE,
        "columns": COLUMNS,
        "categories": CATEGORIES,
        "packages": {
            p.style: {"version": p.info["version"], "author": p.info["author"], "license": p.info["license"]} for p in read
        },
        "pictures": {style: [asdict(pictures[i]) for i in np.flatnonzero(styles == style)] for style in STYLES},
    }
    (out / "index.json").write_text(json.dumps(index))
    held_out = sum(picture.held_out for picture in pictures)
    emoji = len({picture.emoji for picture in pictures})
    print(f"{out}: {len(pictures)} pictures of {emoji} emoji in {len(STYLES)} styles, {held_out} pictures held out")


if __name__ == "__main__":
    main()
