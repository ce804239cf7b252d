"""The measures are what independent computations give, and a folder is judged by what its pictures show."""

import dataclasses
import json
import os
import struct
import zlib

import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from ksag import evaluate
from ksag.commands.evaluate import command, report
from ksag.evaluate import features, measures
from ksag.zoo import files


@pytest.fixture
def two_sets():
    """Features of 300 and 400 pictures, of two distributions that overlap."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(12, 12)) / 4
    one = rng.normal(size=(300, 12)) @ mix
    other = rng.normal(size=(400, 12)) @ mix * 1.2 + rng.normal(size=12) * 0.2
    return torch.from_numpy(one), torch.from_numpy(other)


def statistics(x, **options):
    return evaluate.statistics(x, "some", **options)


def test_frechet_distance_is_that_of_scipys_square_root(two_sets):
    one, other = two_sets
    (m1, c1), (m2, c2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (one, other))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert evaluate.frechet_distance(statistics(one), statistics(other)) == pytest.approx(expected, rel=1e-9)  # float64


@pytest.mark.parametrize("n", [4, 13, 300])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_frechet_distance_of_a_set_from_itself_is_0_and_not_below(two_sets, n, size):
    """Also of fewer pictures than features, whose covariance is singular."""
    one = statistics(two_sets[0][:n] * size)
    assert 0 <= evaluate.frechet_distance(one, one) < 1e-12 * size**2


def test_only_rounding_is_clamped():
    """A matrix that is no covariance shows."""
    one = evaluate.Statistics(
        "some", 9, torch.zeros(2).double(), torch.diag(torch.tensor([1.0, -1e-6]).double()), torch.zeros(9, 2)
    )
    assert evaluate.frechet_distance(one, one) == pytest.approx(-2e-6)


def test_frechet_distance_of_fewer_pictures_than_features():
    """The covariances are singular: of diagonal ones, the root is known."""
    spread, shift = torch.tensor([1.0, 4.0, 0.0, 0.0]).double(), torch.tensor([0.0, 0.0, 3.0, 0.0]).double()
    one = evaluate.Statistics("some", 3, torch.zeros(4).double(), torch.diag(spread), torch.zeros(3, 4))
    other = evaluate.Statistics("some", 3, shift, torch.diag(spread.flip(0)), torch.zeros(3, 4))
    assert evaluate.frechet_distance(one, other) == pytest.approx(9 + 2 * (1 + 4))


def test_kernel_distance_is_the_sum_over_all_pairs(two_sets, monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 128)  # so that there are several
    one, other = two_sets

    def kernel(a, b):
        return (a.numpy() @ b.numpy().T / 12 + 1) ** 3

    def mean_of_pairs(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    expected = mean_of_pairs(kernel(one, one)) + mean_of_pairs(kernel(other, other)) - 2 * kernel(one, other).mean()
    assert evaluate.kernel_distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_are_those_of_a_plain_loop(two_sets, monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 128)
    own, real = (x.numpy()[:150] for x in two_sets)

    def share(points, manifold):
        radii = [np.sort(np.linalg.norm(manifold - p, axis=1))[3] for p in manifold]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points])

    found = evaluate.measure(*(statistics(x[:150].float()) for x in two_sets))
    assert 0.2 < share(own, real) < 0.98
    assert found.precision == pytest.approx(share(own, real)) and found.recall == pytest.approx(share(real, own))


def test_measures_are_torch_fidelitys(two_sets):
    kid, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("kid", "prc"))
    one, other = (x[:300].float() for x in two_sets)
    theirs = kid.kid_features_to_metric(one.double(), other.double(), kid_subsets=1, kid_subset_size=300, verbose=False)
    theirs |= prc.prc_features_to_metric(one, other, verbose=False)
    ours = evaluate.measure(statistics(one), statistics(other))
    assert ours.kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]))


def test_statistics_come_back_from_their_file(two_sets, tmp_path):
    one = statistics(two_sets[0].float(), keep=100)
    one.save(tmp_path / "statistics.safetensors")
    back = evaluate.load_statistics(tmp_path / "statistics.safetensors")
    assert (back.extractor, back.n, len(back.features)) == ("some", 300, 100)
    assert torch.equal(back.mean, one.mean) and torch.equal(back.cov, one.cov)
    torch.testing.assert_close(back.features, one.features, rtol=1e-3, atol=1e-6)  # float16


def test_damaged_statistics_are_an_error(two_sets, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics(two_sets[0].float()).save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        evaluate.load_statistics(path)


def test_statistics_without_their_metadata_are_an_error(two_sets, tmp_path):
    one = statistics(two_sets[0].float())
    files.write(tmp_path / "s.safetensors", {"mean": one.mean, "cov": one.cov, "features": one.features}, n=300)
    with pytest.raises(ValueError, match=r"s\.safetensors holds no statistics"):
        evaluate.load_statistics(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    "x, message", [(torch.zeros(1, 4), "2 pictures or more, got 1"), (torch.full((3, 4), torch.nan), "not finite")]
)
def test_statistics_refuse_what_has_none(x, message):
    with pytest.raises(ValueError, match=message):
        evaluate.statistics(x, "some")


def test_statistics_of_other_features_cannot_be_compared(two_sets):
    one, other = two_sets
    with pytest.raises(ValueError, match=r"some, the reference's others"):
        evaluate.measure(statistics(one), evaluate.statistics(other, "others"))


class Means(nn.Module):
    """Features for tests of folders: the mean of each colour, and the first pixel."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pictures):
        self.calls += 1
        x = pictures.float()
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0]], dim=1)


@pytest.fixture
def extractor():
    return features.Extractor("means", Means())


def make_folder(path, n, seed=0, size=(8, 8)):
    path.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return path


def test_features_of_a_folder_are_those_of_its_pictures(tmp_path, extractor):
    folder = make_folder(tmp_path / "a", 7)
    Image.new("RGB", (4, 6), "red").save(folder / "other.png")  # of another size
    (folder / "ksag.json").write_text("{}")
    (folder / ".000001.png.7.part").write_text("half")
    found = evaluate.folder_features(folder, extractor, batch_size=3)
    expected = [np.asarray(Image.open(path)).astype(float) for path in folder.glob("*.png")]
    expected = sorted([*x.mean((0, 1)), *x[0, 0]] for x in expected)
    np.testing.assert_allclose(sorted(found.tolist()), expected, rtol=1e-5)


def test_the_names_of_the_pictures_do_not_matter(tmp_path, extractor):
    folder = make_folder(tmp_path / "a", 5)
    first = evaluate.folder_features(folder, extractor)
    (folder / "0.png").rename(folder / "zero.png")
    assert torch.equal(evaluate.folder_features(folder.rename(tmp_path / "b"), extractor), first)


def test_a_damaged_picture_is_named(tmp_path, extractor):
    folder = make_folder(tmp_path / "a", 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    with pytest.raises(OSError, match=r"1\.png is damaged"):
        evaluate.folder_features(folder, extractor)


def test_folders_without_pictures_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        evaluate.pictures_in(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        evaluate.pictures_in(tmp_path / "nowhere")


def test_the_classifier_comes_back_from_its_file_and_takes_64_by_64(tmp_path):
    torch.manual_seed(0)
    classifier = features.Classifier((4, 4, 4, 6), 3, 2).eval()
    features.save_classifier(classifier, tmp_path / "c.safetensors", (4, 4, 4, 6), {"seed": 0})
    extractor = features.load_classifier(tmp_path / "c.safetensors")
    pictures = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(extractor(pictures), classifier(pictures).detach(), rtol=1e-2, atol=1e-3)  # float16 weights
    with pytest.raises(ValueError, match="64 × 64, got 32 × 16"):
        extractor(pictures[:, :, :16, :32])
    with pytest.raises(ValueError, match=r"uint8 of \(n, 3, h, w\), got torch.float32"):
        extractor(pictures.float())


def test_samples_are_rounded_as_pillow_stores_them():
    reals = torch.linspace(-1.2, 1.2, 3 * 64).view(3, 8, 8)
    assert torch.equal(features.to_bytes(reals), ((reals.clamp(-1, 1) + 1) * 127.5).round().byte())
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(features.to_bytes(features.to_reals(every)), every)


@pytest.fixture
def judged(monkeypatch, extractor):
    """The command, judging by means."""
    monkeypatch.setattr(features, "load_extractor", lambda *_: extractor)
    return lambda *args: CliRunner().invoke(command, [str(arg) for arg in args])


def test_the_command_judges_folders_side_by_side(tmp_path, judged):
    a, b, reference = (make_folder(tmp_path / name, 12, seed) for seed, name in enumerate("abr"))
    saved, results = tmp_path / "reference.safetensors", tmp_path / "results.json"
    first = judged(a, b, "--reference", reference, "--save-statistics", saved, "--json", results, "--device", "cpu")
    assert first.exit_code == 0, first.output
    found = json.loads(results.read_text())
    assert found["reference_pictures"] == 12 and [r["folder"] for r in found["folders"]] == [str(a), str(b)]
    extractor = features.load_extractor("means")
    one, real = (evaluate.statistics(evaluate.folder_features(folder, extractor), "means") for folder in (a, reference))
    assert found["folders"][0]["fd"] == pytest.approx(evaluate.frechet_distance(one, real))
    assert f"{found['folders'][1]['fd'] / found['folders'][0]['fd']:.3f}" in first.output
    again = judged(a, b, "--reference", saved, "--json", "-", "--device", "cpu")
    back = json.loads(again.output[again.output.index("{") :])
    assert back["folders"][1]["fd"] == pytest.approx(found["folders"][1]["fd"])


def test_a_folder_with_too_few_pictures_is_named_before_any_is_judged(tmp_path, judged):
    a, b = make_folder(tmp_path / "a", 4), make_folder(tmp_path / "b", 3)
    for args in (a, b), (a, "--reference", b):
        result = judged(*args, "--device", "cpu")
        assert result.exit_code == 2 and "b has 3 pictures: precision and recall need 4 or more" in result.output
        assert "%" not in result.output  # no progress


def test_the_table_has_a_row_for_each_folder():
    row = {"pictures": 9, "kid": 0.001, "precision": 0.5, "recall": 0.25}
    text = report([{"folder": "plain", "fd": 2.0, **row}, {"folder": "sag", "fd": 1.5, **row}])
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["plain", "9", "2.0000", "1.000", "0.500", "0.250"],
        ["sag", "9", "1.5000", "1.000", "0.500", "0.250", "0.750"],
    ]


def test_other_features_need_a_reference(tmp_path, judged):
    result = judged(make_folder(tmp_path / "a", 4), "--features", "inception")
    assert result.exit_code == 2 and "--reference is missing" in result.output


@pytest.mark.parametrize(
    ("name", "mode", "colour", "message"),
    [
        ("odd.png", "RGBA", (255, 0, 0, 0), "is transparent: save it as RGB, on the background"),
        ("odd.png", "LA", (9, 9), "is transparent"),
        ("odd.png", "I;16", 30000, "has more than 8 bits a channel: save it as 8-bit RGB"),
        ("odd.tiff", "F", 0.5, "has more than 8 bits a channel"),
    ],
)
def test_pictures_that_are_not_8_bit_rgb_are_refused(tmp_path, name, mode, colour, message):
    Image.new(mode, (8, 8), colour).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        evaluate.load_picture(tmp_path / name)


def save_png(path, width, height, depth=8, rows=8):
    """An RGB PNG of any depth and any size, of which a few rows are there."""
    data = zlib.compress((b"\0" + bytes(width * 3 * depth // 8)) * rows)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_a_picture_of_16_bits_is_refused_although_pillow_opens_it_as_8(tmp_path):
    save_png(tmp_path / "eight.png", 8, 8)
    assert evaluate.load_picture(tmp_path / "eight.png").shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"sixteen\.png has more than 8 bits a channel"):
        evaluate.load_picture(save_png(tmp_path / "sixteen.png", 8, 8, depth=16))


def test_the_size_is_checked_before_the_picture_is_decoded(tmp_path, extractor, monkeypatch):
    folder = make_folder(tmp_path / "a", 3)
    save_png(folder / "large.png", 13_000, 11_000)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"large\.png has 13000 × 11000 pixels; these features need 8 × 8"):
        evaluate.load_picture(folder / "large.png", (8, 8))
    monkeypatch.undo()
    sized = dataclasses.replace(extractor, size=(8, 8))
    with pytest.raises(ValueError, match=r"large\.png has 13000 × 11000 pixels"):
        evaluate.folder_features(folder, sized)


def test_a_picture_that_pillow_finds_too_large_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"huge\.png is too large: Image size \(400000000 pixels\)"):
        evaluate.load_picture(save_png(tmp_path / "huge.png", 20_000, 20_000))


def test_hidden_folders_and_files_do_not_count(tmp_path):
    folder = make_folder(tmp_path / "a", 2)
    make_folder(folder / "more", 1)
    make_folder(folder / ".thumbs", 3)
    make_folder(folder / "more/.cache", 1)
    (folder / "0.png").rename(folder / ".0.png")
    assert sorted(str(path.relative_to(folder)) for path in evaluate.pictures_in(folder)) == ["1.png", "more/0.png"]
    hidden = make_folder(tmp_path / ".b", 2)  # named by the user
    assert len(evaluate.pictures_in(hidden)) == 2


@pytest.mark.parametrize("kind", ["FIFO", "broken link"])
def test_what_is_no_regular_file_is_named_and_does_not_hang(tmp_path, kind):
    folder = make_folder(tmp_path / "a", 2)
    if kind == "FIFO":
        os.mkfifo(folder / "odd.png")
    else:
        (folder / "odd.png").symlink_to("nowhere.png")
    (folder / "link.png").symlink_to("0.png")
    with pytest.raises(OSError, match=r"odd\.png is (a broken link|not a regular file)"):
        evaluate.pictures_in(folder)
    (folder / "odd.png").unlink()
    assert len(evaluate.pictures_in(folder)) == 3


def test_few_pictures_are_a_warning(tmp_path, judged, monkeypatch):
    monkeypatch.setattr("ksag.commands.evaluate.FEW", 12)
    few, enough = make_folder(tmp_path / "few", 11), make_folder(tmp_path / "enough", 12)
    result = judged(enough, few, "--reference", enough, "--device", "cpu")
    assert f"Warning: {few} has 11. With fewer than 12 pictures, FD is too high" in result.output
    assert "enough has" not in result.output and result.exit_code == 0


def test_statistics_of_other_features_are_refused_before_anything_is_computed(tmp_path, judged, two_sets):
    evaluate.statistics(two_sets[0], "others").save(tmp_path / "others.safetensors")
    folder, calls = make_folder(tmp_path / "a", 4), features.load_extractor("means").network.calls
    result = judged(folder, "--reference", tmp_path / "others.safetensors", "--device", "cpu")
    assert isinstance(result.exception, ValueError) and "holds features of others, and these are means" in str(result.exception)
    assert features.load_extractor("means").network.calls == calls


@pytest.mark.parametrize("option", ["--json", "--save-statistics"])
def test_a_result_that_could_not_be_written_is_an_error_before_anything_is_computed(tmp_path, judged, option):
    result = judged(make_folder(tmp_path / "a", 4), "--reference", tmp_path / "a", option, tmp_path / "no" / "where")
    assert result.exit_code == 2 and "there is no folder" in result.output
    assert features.load_extractor("means").network.calls == 0
