"""The figures: each picture and label in its place, nothing cut off or overlapping, and bad input explained."""

import builtins
import importlib
import io
import itertools
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from ksag import PAG, SAG, SEG, GuidedDenoiser, TraceStep, plot
from tests.models import CLASSES

NAMES = ["cat", "dog", "frog"]
SCALES = ("sag_scale", [0, 1, 2])


def pictures(b: int = 3, size: tuple[int, int] = (32, 32), channels: int = 3) -> Tensor:
    return torch.rand(b, channels, *size) * 2 - 1


def decode(latents: Tensor) -> Tensor:
    """Twice the size, and three of the four channels."""
    return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


def sag_step(sigma: float, latent: Tensor | None = None, grid: tuple[int, ...] = (4, 4)) -> TraceStep:
    u = pictures(2) if latent is None else latent
    saliency = torch.rand(len(u), *grid) * 1.5
    mask = torch.nn.functional.interpolate((saliency > 1).float()[:, None], u.shape[2:])
    parts = {"saliency": saliency, "mask": mask, "degraded": u * 0.9, "reevaluated": u * 0.8}
    return TraceStep("SAG", torch.full((len(u),), sigma), u, u * 0.7, u * 0.1, parts)


def pag_step(sigma: float, latent: Tensor | None = None) -> TraceStep:
    g = pictures(2) if latent is None else latent
    return TraceStep("PAG", torch.full((len(g),), sigma), g * 0.5, g, g * 0.2, {"perturbed": g * 0.8})


def grid(figure: plot.Figure) -> list[list]:
    """The axes that hold pictures, by rows, from left to right."""
    rows: dict[float, list] = {}
    for ax in figure.axes:
        if ax.images:
            rows.setdefault(round(ax.get_position().y0 * figure.bbox.height), []).append(ax)
    return [sorted(rows[y], key=lambda ax: ax.get_position().x0) for y in sorted(rows, reverse=True)]


def drawn(ax, layer: int = 0) -> np.ndarray:
    return np.asarray(ax.images[layer].get_array())


def as_drawn(x: Tensor) -> np.ndarray:
    """(c, h, w) pixels as the figure holds them."""
    return ((x.clamp(-1, 1) + 1) / 2).expand(3, -1, -1).permute(1, 2, 0).numpy()


def titles(figure: plot.Figure) -> list[str]:
    return [ax.get_title() for ax in grid(figure)[0]]


def labels(figure: plot.Figure) -> list[str]:
    return [row[0].get_ylabel().replace("\n", " ") for row in grid(figure)]


def texts(figure: plot.Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def assert_texts_are_apart(figure: plot.Figure) -> None:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    panels = [ax.get_window_extent(renderer) for row in grid(figure) for ax in row]
    for name, box in boxes:
        assert not any(box.overlaps(panel) for panel in panels), f"{name!r} is over a picture"
    for i, (name, box) in enumerate(boxes):
        assert not any(box.overlaps(other) for _, other in boxes[i + 1 :]), f"{name!r} overlaps another text"


# compare


def test_compare_has_a_row_for_each_entry_and_a_column_for_each_sample():
    plain, guided = pictures(), pictures()
    figure = plot.compare({"plain": plain, "with SAG": guided}, names=NAMES)
    assert titles(figure) == NAMES and labels(figure) == ["plain", "with SAG"]
    for row, x in zip(grid(figure), (plain, guided), strict=True):
        for ax, image in zip(row, x, strict=True):
            np.testing.assert_allclose(drawn(ax), as_drawn(image), atol=1e-6)
            assert not ax.get_xticks().size and not ax.get_yticks().size


def test_compare_shows_the_difference_as_amplified_as_it_says():
    plain = pictures() * 0.5
    change = torch.zeros_like(plain)
    change[:, :, 8:16] = 0.1
    figure = plot.compare({"plain": plain, "with SAG": plain + change}, difference=True)
    assert labels(figure)[2] == "with SAG − plain, ×8"
    shown = drawn(grid(figure)[2][1])
    np.testing.assert_allclose(shown[8:16], 0.5 + 0.1 / 2 * 8, atol=1e-5)
    np.testing.assert_allclose(shown[:8], 0.5, atol=1e-5)


@pytest.mark.parametrize(("change", "label"), [(0.0, "×64"), (1e-6, "×64"), (1.9, "×1")])
def test_difference_is_amplified_within_reason(change, label):
    plain = torch.full((1, 3, 8, 8), -0.95)
    figure = plot.compare({"plain": plain, "with SAG": plain + change}, difference=True)
    assert labels(figure)[2].endswith(label)


def test_compare_numbers_samples_without_names_and_shows_grey_pictures():
    x = pictures(2, channels=1)
    figure = plot.compare({"x": x.half()})
    assert titles(figure) == ["sample 0", "sample 1"]
    np.testing.assert_allclose(drawn(grid(figure)[0][0]), as_drawn(x[0]), atol=1e-3)


def test_compare_decodes_one_latent_at_a_time():
    seen = []

    def counting(latents):
        seen.append(latents.shape)
        assert not torch.is_grad_enabled()
        return decode(latents)

    latents = pictures(channels=4)
    figure = plot.compare({"plain": latents, "with SAG": latents / 2}, decode=counting)
    assert seen == [(1, 4, 32, 32)] * 6
    np.testing.assert_allclose(drawn(grid(figure)[1][2]), as_drawn(decode(latents / 2)[2]), atol=1e-6)


# trace


def test_trace_shows_each_part_of_evenly_spaced_steps():
    steps = [sag_step(sigma) for sigma in (80.0, 40.0, 20.0, 10.0, 5.0, 2.5, 0.123456)]
    figure = plot.trace(steps, sample=1, columns=3)
    assert titles(figure) == ["σ 80", "σ 10", "σ 0.123"]
    assert [label.split(":")[0] for label in labels(figure)[:5]] == ["saliency over u", "mask", "u", "d", "r"]
    for column, shown in enumerate((steps[0], steps[3], steps[6])):
        overlay, mask, u, d, r, _ = (row[column] for row in grid(figure))
        np.testing.assert_allclose(drawn(overlay), as_drawn(shown.uncond[1]).mean(-1), atol=1e-6)
        np.testing.assert_array_equal(drawn(overlay, 1), shown.saliency[1])
        np.testing.assert_array_equal(drawn(mask), shown.mask[1, 0])
        for ax, x in ((u, shown.uncond), (d, shown.degraded), (r, shown.reevaluated)):
            np.testing.assert_allclose(drawn(ax), as_drawn(x[1]), atol=1e-6)


def test_trace_shows_the_direction_equally_amplified_in_all_columns():
    weak, strong = pag_step(2.0), pag_step(1.0)
    strong = TraceStep(strong.name, strong.sigma, strong.uncond, strong.cond, strong.direction * 2, strong.parts)
    figure = plot.trace([weak, strong])
    assert labels(figure)[2] == "direction, ×2"
    for ax, shown in zip(grid(figure)[2], (weak, strong), strict=True):
        np.testing.assert_allclose(drawn(ax), as_drawn(shown.direction[0] * 2), atol=1e-5)


def test_trace_of_latents_shows_the_change_of_the_decoded_picture():
    latent = sag_step(1.0, pictures(1, (16, 16), channels=4) * 0.8)
    figure = plot.trace([latent], decode=lambda x: decode(x) ** 2)
    change = decode(latent.uncond + latent.direction) ** 2 - decode(latent.uncond) ** 2
    gain = float(labels(figure)[5].split("×")[1])
    np.testing.assert_allclose(drawn(grid(figure)[5][0]), as_drawn(change[0] * gain), atol=1e-5)
    overlay = grid(figure)[0][0]
    assert overlay.images[0].get_extent() == overlay.images[1].get_extent()


def test_trace_has_a_panel_for_each_direction_with_its_own_steps():
    """SAG leaves fewer steps than PAG, as with a sigma_range."""
    steps = [step(sigma) for sigma in (9.0, 3.0) for step in (sag_step, pag_step)] + [pag_step(1.0)]
    figure = plot.trace(steps)
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["SAG", "PAG"]
    sag, pag = ([ax for ax in figure.axes if ax.figure is panel and ax.images] for panel in figure.subfigs)
    assert len(sag) == 6 * 2 and len(pag) == 3 * 3
    assert [ax.get_title() for ax in pag[:3]] == ["σ 9", "σ 3", "σ 1"]
    assert [ax.get_ylabel() for ax in pag[::3]] == ["g: prediction", "p: perturbed", "direction, ×4"]
    np.testing.assert_allclose(drawn(pag[2]), as_drawn(steps[4].cond[0]), atol=1e-6)
    np.testing.assert_allclose(drawn(pag[5]), as_drawn(steps[4].perturbed[0]), atol=1e-6)


def test_trace_shows_what_a_users_own_direction_keeps():
    g = pictures(1)
    step = TraceStep("mine", torch.ones(1), g, g, g * 0.1, {"sharpened": g * 0.6, "weights": torch.ones(1)})
    figure = plot.trace([step])
    assert labels(figure) == ["g: prediction", "sharpened", "direction, ×8"]


def test_trace_takes_what_a_wrapper_traced(denoiser):
    guided = GuidedDenoiser(denoiser, [SAG(), PAG(), SEG()], cond_key="mapping_cond")
    x, cond = torch.randn(2, 3, 16, 16), torch.rand(2, CLASSES)
    with guided.trace() as steps:
        guided(x, torch.ones(2), cond=cond, uncond=torch.zeros_like(cond), cond_scale=2.0)
    figure = plot.trace(steps)
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["SAG", "PAG", "SEG"]
    assert len([ax for ax in figure.axes if ax.images]) == 6 + 3 + 3


# Other numbers of dimensions


def test_a_video_is_a_row_of_evenly_spaced_frames():
    video = torch.rand(2, 3, 11, 8, 12) * 2 - 1
    figure = plot.compare({"x": video, "dark": video - 1}, difference=True)
    row = drawn(grid(figure)[0][1])
    assert row.shape == (8, 6 * 12, 3)
    for i, t in enumerate((0, 2, 4, 6, 8, 10)):
        np.testing.assert_allclose(row[:, 12 * i : 12 * (i + 1)], as_drawn(video[1, :, t]), atol=1e-6)


def test_the_saliency_of_a_video_is_over_the_frames_that_it_belongs_to():
    """Three tokens along time for nine frames, of which six are shown."""
    saliency = torch.arange(3.0)[None, :, None, None].expand(1, 3, 4, 6)
    step = sag_step(1.0, torch.rand(1, 3, 9, 8, 12) * 2 - 1, (3, 4, 6))
    step.parts["saliency"] = saliency
    overlay, mask = (row[0] for row in grid(plot.trace([step]))[:2])
    assert drawn(overlay, 1).shape == (4, 6 * 6) and drawn(mask).shape == (8, 6 * 12)
    assert drawn(overlay, 1)[0, ::6].tolist() == [0, 0, 1, 1, 2, 2]
    assert overlay.images[0].get_extent() == overlay.images[1].get_extent()


def test_a_short_video_shows_each_frame_once():
    video = torch.rand(1, 1, 4, 8, 8) * 2 - 1
    decoded = plot.compare({"x": pictures(1, channels=4)}, decode=lambda latent: video)
    np.testing.assert_allclose(drawn(grid(decoded)[0][0]), as_drawn(torch.cat(list(video[0].unbind(1)), -1)), atol=1e-6)


def test_a_latent_with_one_dimension_is_a_strip_with_a_line_for_each_channel():
    latent = torch.rand(1, 2, 40) * 2 - 1
    step = sag_step(1.0, latent, (10,))
    overlay, _, u, *_ = (row[0] for row in grid(plot.trace([step])))
    strip = drawn(u)
    assert strip.shape == (10, 40, 3)  # a fourth as high as wide
    for channel in range(2):
        line = (latent[0, channel] + 1) / 2
        np.testing.assert_allclose(strip[5 * channel : 5 * channel + 5, :, 0], line.expand(5, -1), atol=1e-6)
    np.testing.assert_array_equal(drawn(overlay, 1)[0], step.saliency[0])


def test_a_long_latent_is_averaged():
    latent = torch.rand(1, 1, 10 * plot.STRIP) * 2 - 1
    strip = drawn(grid(plot.compare({"x": latent}))[0][0])
    mean = latent[0, 0].unflatten(0, (-1, 10)).mean(1)
    np.testing.assert_allclose(strip[0, :, 0], (mean + 1) / 2, atol=1e-6)


# saliency


def test_saliency_lies_over_the_grey_picture_under_one_labelled_scale():
    images, attended = pictures(), torch.rand(3, 4, 4) * 3
    figure = plot.saliency(images, attended, names=NAMES)
    assert titles(figure)[:3] == NAMES
    overlays = [ax for ax in figure.axes if len(ax.images) == 2]
    for ax, image, values in zip(overlays, images, attended, strict=True):
        np.testing.assert_allclose(drawn(ax), as_drawn(image).mean(-1), atol=1e-6)
        np.testing.assert_array_equal(drawn(ax, 1), values)
        assert ax.images[0].get_extent() == ax.images[1].get_extent()
    assert len({(ax.images[1].norm.vmin, ax.images[1].norm.vmax) for ax in overlays}) == 1
    (bar,) = (ax for ax in figure.axes if ax not in overlays)
    assert bar.get_title(loc="left") == "saliency"
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0", "1, the average", f"{attended.max():.2g}"]


def test_a_flat_saliency_looks_flat():
    figure = plot.saliency(pictures(1), torch.full((1, 4, 4), 1.01))
    norm = figure.axes[0].images[1].norm
    assert norm(1.01) - norm(1.0) < 0.01


def test_mask_is_outlined_on_the_picture():
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, 2:4, 4:8] = 1
    figure = plot.saliency(pictures(1), torch.ones(1, 4, 4), mask=mask)
    (outline,) = figure.axes[0].collections
    points = np.concatenate([path.vertices for path in outline.get_paths()])
    edges = [[4 * 4 - 0.5, 2 * 4 - 0.5], [8 * 4 - 0.5, 4 * 4 - 0.5]]  # a pixel of the mask is four of the picture
    np.testing.assert_allclose([points.min(0), points.max(0)], edges, atol=0.3)
    corners = np.abs(points[:, None] - np.array([edges[0], [edges[0][0], edges[1][1]]])).max(-1).min(0)
    assert (corners < 0.6).all()  # square, not cut


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_of_everything_or_nothing_has_no_outline(value):
    figure = plot.saliency(pictures(1), torch.ones(1, 4, 4), mask=torch.full((1, 1, 8, 8), value))
    assert not figure.axes[0].collections


# xyz


def test_xyz_runs_each_setting_once_and_shows_it_in_its_place():
    runs = []

    def sample(**setting):
        runs.append(setting)
        return torch.full((1, 3, 8, 8), setting["sag_scale"] / 10 + setting["blur_sigma"] / 100 - setting["cond_scale"] / 20)

    figure = plot.xyz(sample, x=("sag_scale", [0, 1.5, 2.0]), y=("blur_sigma", [1.0, 2.0]), z=("cond_scale", [1.0, 7.5]))
    assert len(runs) == 12 == len({tuple(sorted(run.items())) for run in runs})
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["cond_scale 1", "cond_scale 7.5"]
    for panel, cond_scale in zip(figure.subfigs, (1.0, 7.5), strict=True):
        axes = np.array([ax for ax in figure.axes if ax.figure is panel]).reshape(2, 3)
        assert [ax.get_title().split() for ax in axes[0]] == [["sag_scale", "0"], ["sag_scale", "1.5"], ["sag_scale", "2"]]
        assert [ax.get_ylabel() for ax in axes[:, 0]] == ["blur_sigma 1", "blur_sigma 2"]
        for i, blur_sigma in enumerate((1.0, 2.0)):
            for j, sag_scale in enumerate((0, 1.5, 2.0)):
                value = sag_scale / 10 + blur_sigma / 100 - cond_scale / 20
                np.testing.assert_allclose(drawn(axes[i, j])[1:-1, 1:-1], (value + 1) / 2, atol=1e-6)


def test_xyz_of_one_axis_has_names_of_any_kind():
    figure = plot.xyz(lambda sampler: pictures(1), x=("sampler", ["euler", "heun"]))
    assert titles(figure) == ["sampler euler", "sampler heun"] and labels(figure) == [""]


def test_xyz_tiles_the_samples_of_a_setting():
    x = pictures(3)
    sheet = drawn(grid(plot.xyz(lambda sag_scale: x, x=("sag_scale", [1])))[0][0])
    assert sheet.shape == (2 * 33 + 1, 2 * 33 + 1, 3)
    np.testing.assert_allclose(sheet[1:33, 34:66], as_drawn(x[1]), atol=1e-6)
    np.testing.assert_array_equal(sheet[33:, 33:], 1)


def test_xyz_decodes():
    latents = pictures(1, channels=4)
    figure = plot.xyz(lambda sag_scale: latents, x=SCALES, decode=decode)
    np.testing.assert_allclose(drawn(grid(figure)[0][2]), as_drawn(decode(latents)[0]), atol=1e-6)


def test_xyz_shows_its_progress(capsys):
    plot.xyz(lambda **setting: pictures(1), x=SCALES, y=("blur_sigma", [1, 2]))
    assert "sag_scale × blur_sigma: 100%" in capsys.readouterr().err


# How it looks

PROMPT = "a photograph of an astronaut who rides a horse on the moon, highly detailed, sharp focus, much more than fits on a line"


def long_panels() -> plot.Figure:
    axes = {"x": ("mask_threshold", [0.8, 1.25]), "y": ("sampler", ["dpmpp_2s_ancestral", "dpmpp_3m_sde"])}
    return plot.xyz(lambda **setting: pictures(1), z=("cond_scale", [1, 2]), **axes)


FIGURES = {
    "compare": lambda: plot.compare({"plain": pictures(8), "with SAG": pictures(8)}, names=["automobile"] * 8),
    "one": lambda: plot.compare({"one": pictures(1)}),
    "wide": lambda: plot.compare({"with Self-Attention Guidance": pictures(2, (32, 96))}, names=[PROMPT] * 2),
    "tall and large": lambda: plot.compare({"x": pictures(3, (256, 128))}),
    "trace": lambda: plot.trace([sag_step(80.0 / 1.37**i) for i in range(5)]),
    "directions": lambda: plot.trace([step(80.0 / 1.37**i) for i in range(3) for step in (sag_step, pag_step)]),
    "video": lambda: plot.compare({"x": torch.rand(2, 3, 9, 32, 48), "y": torch.rand(2, 3, 9, 32, 48)}, names=NAMES[:2]),
    "strip": lambda: plot.trace([sag_step(80.0 / 2**i, torch.rand(1, 8, 100), (25,)) for i in range(2)]),
    "saliency": lambda: plot.saliency(pictures(), torch.rand(3, 4, 4), names=NAMES),
    "xyz": long_panels,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_pictures_are_large_and_texts_are_whole_and_apart(name):
    figure = FIGURES[name]()
    image = Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")
    assert_texts_are_apart(figure)
    for ax in itertools.chain(*grid(figure)):
        box = ax.get_window_extent()
        assert box.width > 0.6 * plot.NARROWEST * figure.dpi < 2 * box.height
        assert box.width / box.height == pytest.approx(drawn(ax).shape[1] / drawn(ax).shape[0], rel=0.02)
    inked = np.argwhere(np.asarray(image).min(-1) < 250)
    margins = [*inked.min(0), *np.array(image.size[::-1]) - inked.max(0)]
    assert min(margins) > 0 and max(margins) < 0.25 * figure.dpi  # nothing is cut off, and there is little around it


def test_a_notebook_shows_a_figure_once_and_pyplot_knows_nothing_of_it():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    figure = plot.compare({"x": pictures(1)})
    assert figure._repr_png_().startswith(b"\x89PNG") and not plt.get_fignums() and dict(plt.rcParams) == before


def test_figure_is_written_to_a_file(tmp_path):
    plot.compare({"x": pictures(1)}).savefig(tmp_path / "x.png")
    assert min(Image.open(tmp_path / "x.png").size) > 100


# Bad input

LATENTS = r"shape \(3, 4, 32, 32\), but pictures have 1 or 3 channels: give decode="

BAD = [
    (lambda: plot.compare({}), ValueError, "compare shows 1 or more entries"),
    (lambda: plot.compare({"x": pictures()}, difference=True), ValueError, "compare shows 2 or more entries"),
    (lambda: plot.compare({"x": pictures(channels=4)}), ValueError, "x has " + LATENTS),
    (lambda: plot.compare({"x": pictures()[0, 0]}), TypeError, r"x must be .* \(b, c, h, w\).*\(32, 32\)"),
    (lambda: plot.compare({"x": pictures().byte()}), TypeError, "torch.uint8"),
    (lambda: plot.compare({"x": [1]}), TypeError, "got list"),
    (lambda: plot.compare({"x": pictures() * torch.nan}), ValueError, "x holds NaN"),
    (lambda: plot.compare({"a": pictures(), "b": pictures(2)}), ValueError, r"'a': \(3, .*'b': \(2, "),
    (lambda: plot.compare({"x": pictures()}, names=["cat"]), ValueError, "each of the 3 samples, got 1: cat"),
    (lambda: plot.compare({"x": pictures(channels=4)}, decode=lambda z: z), ValueError, r"decode\(x\) has " + LATENTS),
    (lambda: plot.compare({"x": pictures()}, decode=lambda z: None), TypeError, "got NoneType"),
    (lambda: plot.compare({"x": pictures()}, decode=lambda z: z[0, 0]), TypeError, r"decode\(x\) must be .* got torch.float32"),
    (lambda: plot.trace([]), ValueError, "at scale 0 or outside its sigma_range"),
    (lambda: plot.trace([sag_step(1.0)], sample=2), IndexError, "index 2 is out of bounds"),
    (lambda: plot.trace([sag_step(1.0, pictures(channels=4))]), ValueError, "give decode="),
    (lambda: plot.saliency(pictures(), torch.ones(2, 4, 4)), ValueError, r"saliency must be \(b, \*grid\) .*\(2, 4, 4\)"),
    (
        lambda: plot.saliency(pictures(), torch.ones(3, 4, 4), mask=torch.ones(3, 4, 4)),
        ValueError,
        r"mask must be \(b, 1, .*\(3, 4, 4\)",
    ),
    (lambda: plot.xyz(pictures, x=("sag_scale", [])), ValueError, "a parameter of its own and values"),
    (lambda: plot.xyz(pictures, x=SCALES, y=("sag_scale", [1])), ValueError, "a parameter of its own and values"),
    (lambda: plot.xyz(lambda sag_scale: None, x=SCALES), TypeError, r"sample\(\*\*\{'sag_scale': 0\}\) must be .* got NoneType"),
]


@pytest.mark.parametrize(("draw", "error", "message"), BAD)
def test_bad_input_gets_an_error_that_says_what_to_do(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "ksag.plot")
    with pytest.raises(ImportError, match=r"pip install '\.\[notebook\]'"):
        importlib.import_module("ksag.plot")
