"""Does scripts/make_emoji.py make of npm packages the pictures, names and categories that they hold, and hold out whole emoji?"""

import json
import math

import numpy as np
import pytest
from PIL import Image

from tests.emoji_packages import ICONS, make_data, make_emoji


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("emoji"))


def pictures_of(data, style):
    return {p["name"]: p for p in json.loads((data / "index.json").read_text())["pictures"][style]}


def test_every_picture_is_its_icon(data):
    for style in set(make_emoji.STYLES) - {"fxemoji"}:
        sheet = np.asarray(Image.open(data / f"{style}.webp").convert("RGB"))
        for i, name in enumerate(pictures_of(data, style)):
            cell = sheet[:, 64 * i : 64 * (i + 1)]
            fill = "#ff0000" if name == "hound" else ICONS[name][0]
            expected = np.full((64, 64, 3), 255)
            expected[:, :32] = [int(fill[j : j + 2], 16) for j in (1, 3, 5)]
            assert np.array_equal(cell, expected), (style, name)


def test_flags_tones_hidden_and_blank_icons_are_left_out(data):
    assert set(pictures_of(data, "noto")) == set(ICONS) | {"hound"}
    assert set(pictures_of(data, "fluent-emoji")) == set(ICONS)


def test_one_emoji_has_one_name_in_all_styles(data):
    noto, fxemoji, twemoji = (pictures_of(data, style) for style in ("noto", "fxemoji", "twemoji"))
    assert noto["man-cook"]["emoji"] == noto["woman-cook"]["emoji"] == twemoji["man-cook"]["emoji"]
    assert fxemoji["sliceofpizza"]["emoji"] == noto["pizza"]["emoji"]  # by Unicode's name of its code point
    assert fxemoji["puppy"]["emoji"] == noto["dog"]["emoji"]  # by another package's alias
    assert noto["hound"]["emoji"] == noto["dog"]["emoji"]  # by the pictures: they are equal
    assert len({p["emoji"] for p in noto.values()}) == 5


def test_categories_are_those_of_unicode(data):
    noto, fxemoji = pictures_of(data, "noto"), pictures_of(data, "fxemoji")
    assert {name: noto[name]["category"] for name in ICONS} == {name: category for name, (_, category) in ICONS.items()}
    assert fxemoji["sliceofpizza"]["category"] == "Food & Drink"  # not its own package's, as others know better
    assert fxemoji["poo"]["category"] == "Animals & Nature"  # nobody else has it


def test_symbols_and_clocks_are_not_mirrored(data):
    may = {name: picture["mirror"] for name, picture in pictures_of(data, "noto").items() if name in ICONS}
    assert [name for name in may if not may[name]] == ["plus", "alarm-clock"]


def test_about_one_emoji_in_twenty_is_held_out():
    held_out = [make_emoji.is_held_out(f"emoji {i}") for i in range(4000)]
    assert abs(np.mean(held_out) - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_near_pairs():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    images[5] = images[2] // 2 * 2  # differs by at most 1 of 255
    assert list(make_emoji.near_pairs(images, 0.05, block=3)) == [(2, 5)]
