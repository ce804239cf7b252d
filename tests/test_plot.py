"""The figures: what is drawn where, under which label, and that none of it is cut off."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import ksag
from ksag import plot
from tests.conftest import inputs, make_denoiser


def pictures(figure):
    """Every array that the figure shows, in its order."""
    return [np.asarray(image.get_array()) for ax in figure.findobj(lambda a: hasattr(a, "get_images")) for image in ax.get_images()]


def texts(figure):
    return [t.get_text().replace("\n", " ") for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def assert_nothing_is_cut_off(figure):
    figure.canvas.draw()
    box = figure.bbox
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            assert extent.x0 >= box.x0 - 1 and extent.y0 >= box.y0 - 1, text.get_text()
            assert extent.x1 <= box.x1 + 1 and extent.y1 <= box.y1 + 1, text.get_text()


def solid(*values, size=(8, 12)):
    return torch.stack([torch.full((3, *size), float(value)) for value in values])


@pytest.fixture(scope="module")
def steps():
    denoiser = make_denoiser()
    guided = ksag.SAGDenoiser(denoiser, cond_key="mapping_cond")
    with guided.trace() as steps:
        for sigma in 5.0, 2.0, 0.5:
            x, sigmas, cond, uncond = inputs(sigma=sigma)
            guided(x, sigmas, cond=cond, uncond=uncond, cond_scale=2.0)
    return steps


def test_compare_draws_a_row_per_entry_and_a_column_per_sample():
    figure = plot.compare({"plain": solid(-1, 0), "with SAG": solid(1, 0.5)}, names=["cat", "dog"])
    assert [float(p.mean()) for p in pictures(figure)] == pytest.approx([0, 0.5, 1, 0.75])
    assert {"plain", "with SAG", "cat", "dog"} <= set(texts(figure))
    assert_nothing_is_cut_off(figure)


def test_compare_shows_the_difference_around_grey_by_the_factor_that_it_names():
    base = torch.zeros(1, 3, 8, 8)
    changed = base.clone()
    changed[:, :, :4] = 0.02
    figure = plot.compare({"plain": base, "with SAG": changed}, difference=True)
    gain = float(next(text for text in texts(figure) if "×" in text).rpartition("×")[2])
    difference = pictures(figure)[-1]
    assert gain > 1 and np.allclose(difference[5:], 0.5) and np.allclose(difference[:4], 0.5 + gain * 0.01)


def test_latents_are_decoded_one_by_one():
    seen = []

    def decode(latents):
        seen.append(tuple(latents.shape))
        return latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)

    figure = plot.compare({"latents": torch.zeros(2, 4, 6, 6)}, decode=decode)
    assert seen == [(1, 4, 6, 6)] * 2 and all(p.shape[:2] == (12, 12) for p in pictures(figure))


def test_trace_shows_the_chosen_steps(steps):
    figure = plot.trace(steps, sample=1, columns=2)
    labels = texts(figure)
    assert {"σ 5", "σ 0.5"} <= set(labels) and "σ 2" not in labels
    drawn = pictures(figure)
    for step in steps[0], steps[2]:
        for part in step.uncond, step.degraded, step.reevaluated:
            wanted = (part[1].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) / 2
            assert any(p.shape == wanted.shape and np.allclose(p, wanted, atol=1e-6) for p in drawn)
        mask = step.mask[1, 0].numpy()
        assert any(p.shape[:2] == mask.shape and np.allclose(p if p.ndim == 2 else p[..., 0], mask) for p in drawn)
    assert_nothing_is_cut_off(figure)


def test_xyz_runs_every_setting_once_and_labels_it():
    calls = []

    def sample(**setting):
        calls.append(setting)
        return solid(setting["a"] / 10 + setting["b"] / 100 + setting["c"] / 1000)

    figure = plot.xyz(sample, x=("a", [1, 2, 3]), y=("b", [1, 2]), z=("c", [1, 2]))
    assert len(calls) == 12 == len({tuple(sorted(call.items())) for call in calls})
    assert {"a 1", "a 2", "a 3", "b 1", "b 2", "c 1", "c 2"} <= set(texts(figure))
    levels = [round(float(p[p.shape[0] // 2, p.shape[1] // 2, 0]) * 2 - 1, 3) for p in pictures(figure)]
    assert levels == [round(a / 10 + b / 100 + c / 1000, 3) for c in (1, 2) for b in (1, 2) for a in (1, 2, 3)]
    assert_nothing_is_cut_off(figure)


def test_saliency_has_a_colour_bar_and_titles(steps):
    figure = plot.saliency(steps[2].uncond, steps[2].saliency, mask=steps[2].mask, names=["cat", "dog"])
    assert {"cat", "dog"} <= set(texts(figure)) and any("saliency" in text for text in texts(figure))
    assert any(np.allclose(p, steps[2].saliency[0].numpy()) for p in pictures(figure) if p.shape == steps[2].saliency[0].shape)
    assert_nothing_is_cut_off(figure)


def test_a_figure_shows_itself_once_and_leaves_pyplot_alone():
    figure = plot.compare({"plain": solid(0)})
    assert figure._repr_png_().startswith(b"\x89PNG")
    code = (
        "import sys, torch; from ksag import plot; plot.compare({'a': torch.zeros(1, 3, 8, 8)}); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.compare({}), ValueError, "got 0"),
        (lambda: plot.compare({"a": torch.zeros(1, 4, 8, 8)}), ValueError, r"1 or 3 channels. For latents pass decode="),
        (lambda: plot.compare({"a": torch.full((1, 3, 8, 8), torch.nan)}), ValueError, "NaN"),
        (lambda: plot.compare({"a": solid(0), "b": solid(0, 1)}), ValueError, "'a' has shape"),
        (lambda: plot.compare({"a": solid(0)}, names=["cat", "dog"]), ValueError, "a name for each of the 1 samples, got 2"),
        (lambda: plot.trace([]), ValueError, "holds no step"),
        (lambda: plot.xyz(lambda **_: solid(0), x=("a", [])), ValueError, "such as"),
        (lambda: plot.xyz(lambda **_: solid(0), x=("a", [1]), y=("a", [1])), ValueError, "parameter of its own"),
        (lambda: plot.saliency(solid(0), torch.zeros(2, 4, 4)), ValueError, "saliency must be of shape"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_sample_that_is_not_there(steps):
    with pytest.raises(ValueError, match="sample=2"):
        plot.trace(steps, sample=2)
