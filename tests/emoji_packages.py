"""Packages of emoji as npm has them, drawn here, and the data set that scripts/make_emoji.py makes of them.

The icons are rectangles of one colour, so that what becomes of each is known.
"""

import json
import subprocess
import sys
from pathlib import Path

import make_emoji

ROOT = Path(__file__).parents[1]

ICONS = {  # name: fill, category
    "dog": ("#ff0000", "Animals & Nature"),
    "man-cook": ("#00ff00", "People & Body"),
    "woman-cook": ("#00aa00", "People & Body"),
    "pizza": ("#0000ff", "Food & Drink"),
    "plus": ("#ff00ff", "Symbols"),
    "alarm-clock": ("#00ffff", "Travel & Places"),
}


def icon(fill, left=0):
    """Its left half is filled; `left` moves the view box along, so that the picture stays the same."""
    return {"body": f'<rect fill="{fill}" x="{left}" width="8" height="16"/>'} | ({"left": left} if left else {})


def write_package(folder, icons, categories, aliases=None, chars=None):
    folder.mkdir(parents=True)
    by_category = {c: [name for name in categories if categories[name] == c] for c in sorted(set(categories.values()))}
    files = {
        "icons": {"prefix": folder.name, "width": 16, "height": 16, "icons": icons, "aliases": aliases or {}},
        "metadata": {"categories": by_category} if by_category else {},
        "chars": chars or {},
        "info": {"author": {"name": "A. Painter"}, "license": {"spdx": "MIT"}},
        "package": {"version": "1.2.3", "license": "MIT"},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_packages(folder):
    """All seven packages: each has the same six icons, and some what is to be left out, or other names."""
    icons = {name: icon(fill, left=4 * i) for i, (name, (fill, _)) in enumerate(ICONS.items())}
    categories = {name: category for name, (_, category) in ICONS.items()}
    for style in make_emoji.STYLES:
        package = folder / "@iconify-json" / style
        if style == "noto":
            more = {
                "man-cook-dark-skin-tone": icon("#111111"),
                "old-name": icon("#222222") | {"hidden": True},
                "flag-france": icon("#333333"),
                "blank": icon("#ffffff"),
                "hound": icon("#ff0000"),
            }
            sorts = dict.fromkeys(more, "Animals & Nature") | {"flag-france": "Flags"}
            write_package(package, icons | more, categories | sorts, {"puppy": {"parent": "dog"}}, {"1f355": "pizza"})
        elif style == "fxemoji":
            own = {"sliceofpizza": icon("#0000aa"), "poo": icon("#964b00"), "puppy": icon("#aa0000")}
            write_package(package, own, {"sliceofpizza": "Objects", "poo": "Nature", "puppy": "Objects"})
        elif style == "fluent-emoji":
            write_package(package, icons | {"man-cook-dark": icon("#444444")}, {})
        else:
            write_package(package, icons, categories)


def make_data(folder):
    """The data set of those packages, with the dog held out."""
    write_packages(folder / "node_modules")
    command = [sys.executable, ROOT / "scripts/make_emoji.py", "--packages", folder / "node_modules", "--out", folder / "emoji"]
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert made.returncode == 0 and "40 pictures of 6 emoji in 7 styles" in made.stdout, made.stdout + made.stderr
    index = json.loads((folder / "emoji/index.json").read_text())
    for described in index["pictures"].values():
        for picture in described:
            picture["held_out"] = picture["emoji"] == "dog"
    (folder / "emoji/index.json").write_text(json.dumps(index))
    return folder / "emoji"
