"""Does scripts/nearest_emoji.py find the training picture that is nearest to a sample, or its mirror image?"""

import json

import nearest_emoji
import torch
from click.testing import CliRunner
from PIL import Image
from train_emoji import load_pictures, to_reals

from ksag import zoo
from tests.emoji_packages import make_data
from tests.test_zoo import small_config, small_model


def rms(a, b):
    return ((a - b) / 2).square().mean().sqrt()


def test_nearest_by_every_pair():
    pictures, known = torch.rand(70, 3, 8, 8) * 2 - 1, torch.rand(9, 3, 8, 8) * 2 - 1
    which, distance = nearest_emoji.nearest(pictures, known)
    for i, picture in enumerate(pictures):
        distances = [rms(picture, other) for other in known]
        assert distances[which[i]] == min(distances)
        torch.testing.assert_close(distance[i], min(distances), rtol=1e-4, atol=0)


def test_it_reports_and_shows_samples_beside_their_nearest_pictures(tmp_path):
    data = make_data(tmp_path)
    zoo.save(small_model().state_dict(), tmp_path / "weights.safetensors", small_config())
    options = {
        "data": data,
        "weights": tmp_path / "weights.safetensors",
        "n": 3,
        "shown": 2,
        "steps": 2,
        "out": tmp_path / "nearest.png",
    }
    result = CliRunner().invoke(nearest_emoji.main, [str(part) for name, value in options.items() for part in (f"--{name}", value)])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "nearest.png").size == (3 * 68 + 4, 2 * 132 + 4)

    training, held_out = load_pictures(data, list(zoo.CATEGORIES), list(zoo.STYLES))
    assert training.mirror.any() and not training.mirror.all()
    images = to_reals(training.images)
    known = torch.cat([images, images[training.mirror].flip(3)])
    expected = [min(rms(picture, other) for other in known).item() for picture in to_reals(held_out.images)]
    record = json.loads((tmp_path / "nearest.json").read_text())
    assert record["held_out"][0] == round(min(expected), 4) and record["held_out"][-1] == round(max(expected), 4)
    assert record["seeds"] == [0, 2] and all(0 < value < 2 for value in record["samples"])
