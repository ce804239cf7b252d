"""Does `ksag sample` fill a folder by seed, whatever stops it, and however many processes share the work?"""

import json
import signal
import time

import psutil
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from ksag.commands.folder import Folder
from ksag.commands.processes import Process
from ksag.commands.sample import into_folder
from ksag.commands.sampling import Sampling
from tests.commands import invoke, pixels, process, save_small_model, text


@pytest.fixture
def weights(tmp_path):
    return save_small_model(tmp_path / "small.safetensors")


@pytest.fixture
def sample(weights):
    def run(*args, **options):
        return invoke("sample", "--weights", weights, "--device", "cpu", "--steps", 2, *args, **options)

    return run


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def unchanged(folder):
    """What tells whether a file was written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_a_png_for_each_seed_beside_what_made_them(sample, tmp_path):
    assert "3 pictures" in sample("--n", 3, "--seed", 5, "--classes", "cat,dog", "--out", tmp_path / "a")
    assert names(tmp_path / "a") == ["000005.png", "000006.png", "000007.png", "ksag.json"]
    settings = json.loads((tmp_path / "a/ksag.json").read_text())
    assert settings["Prompt"] == ["cat", "dog"] and settings["Steps"] == "2" and "Seed" not in settings
    assert text(tmp_path / "a/000005.png").startswith("dog\n") and "Seed: 5," in text(tmp_path / "a/000005.png")


def test_a_seeds_picture_does_not_depend_on_the_others(sample, tmp_path):
    sample("--n", 5, "--batch-size", 2, "--out", tmp_path / "a", "--sampler", "euler_ancestral")
    sample("--n", 1, "--seed", 3, "--out", tmp_path / "b", "--sampler", "euler_ancestral")
    assert (pixels(tmp_path / "a/000003.png") - pixels(tmp_path / "b/000003.png")).abs().max() <= 1  # of 255: the rounding
    assert text(tmp_path / "a/000003.png") == text(tmp_path / "b/000003.png")
    assert (pixels(tmp_path / "a/000003.png") - pixels(tmp_path / "a/000002.png")).abs().mean() > 10


def test_dpm_adaptive_whose_steps_are_a_batchs_makes_pictures_one_by_one(sample, tmp_path):
    sample("--n", 3, "--out", tmp_path / "a", "--sampler", "dpm_adaptive")
    sample("--n", 1, "--seed", 2, "--out", tmp_path / "b", "--sampler", "dpm_adaptive")
    assert torch.equal(pixels(tmp_path / "a/000002.png"), pixels(tmp_path / "b/000002.png"))
    assert "--batch-size 1" in sample("--sampler", "dpm_adaptive", "--batch-size", 2, "--out", tmp_path / "c", code=2)


def test_a_second_run_makes_what_is_missing_and_a_longer_one_goes_on(sample, tmp_path):
    folder = tmp_path / "a"
    sample("--n", 4, "--out", folder)
    before = unchanged(folder)
    (folder / "000001.png").unlink()
    sample("--n", 6, "--out", folder)
    after = unchanged(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"000001.png", "000004.png", "000005.png"}
    sample("--n", 3, "--out", folder)
    assert unchanged(folder) == after


def test_a_picture_that_is_made_later_is_made_in_its_batch(sample, tmp_path, monkeypatch):
    """A GPU rounds by a sample's place in it; a CPU does not, so that the files alone would not tell."""
    made, pictures = [], Sampling.pictures
    monkeypatch.setattr(Sampling, "pictures", lambda self, seeds: made.append(list(seeds)) or pictures(self, seeds))
    folder = tmp_path / "a"
    sample("--n", 5, "--batch-size", 2, "--out", folder)
    whole = {name: (folder / name).read_bytes() for name in names(folder)}
    (folder / "000001.png").unlink()
    (folder / "000004.png").unlink()
    sample("--n", 5, "--batch-size", 2, "--out", folder)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == whole
    assert made == [[0, 1], [2, 3], [4, 4], [0, 1], [4, 4]]


def test_processes_make_the_batches_of_one(tmp_path):
    made = []

    def make(seeds):
        made.append(list(seeds))
        return [Image.new("RGB", (1, 1)) for _ in seeds]

    for rank in 1, 0:
        process = Process(rank, 2, torch.device("cpu"))
        into_folder(Folder(tmp_path, {}), range(7), 2, process, make, str, tqdm(total=7, disable=True))
    assert made == [[2, 3], [6, 6], [0, 1], [4, 5]] and len(list(tmp_path.glob("*.png"))) == 7
    made.clear()
    for rank in 1, 0:
        process = Process(rank, 2, torch.device("cpu"))
        into_folder(Folder(tmp_path, {}), range(10, 13), 8, process, make, str, tqdm(total=3, disable=True))
    assert made == [[12, 12], [10, 11]]  # smaller batches rather than an idle process


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (["--steps", 3], "Steps is 2 there, 3 here"),
        (["--sag-scale", 1], "SAG scale is 0.5 there, 1 here"),
        (["--classes", "dog"], "Prompt is ['bird', 'cat', 'dog'] there, ['dog'] here"),
        (["--compare"], "Compare is not set there, plain beside SAG here"),
        (["--cfg-rule", "rescale:0.7"], "CFG rule is plain there, rescale(phi=0.7) here"),
        (["--dtype", "bfloat16"], "Precision is float32 there, bfloat16 here"),
        (["--schedule", "exponential"], "Schedule type is Karras there, Exponential here"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(sample, tmp_path, other, difference):
    sample("--n", 1, "--out", tmp_path / "a")
    before = unchanged(tmp_path / "a")
    assert difference in sample("--n", 2, *other, "--out", tmp_path / "a", code=1)
    assert unchanged(tmp_path / "a") == before


def test_another_model_of_the_same_name_is_refused(sample, weights, tmp_path):
    sample("--n", 1, "--out", tmp_path / "a")
    save_small_model(weights, classes=("bird", "cat", "eel"))
    assert "Model hash is" in sample("--n", 2, "--out", tmp_path / "a", code=1)


def test_what_only_rounds_and_what_only_says_how_many_is_no_other_setting(sample, tmp_path):
    sample("--n", 1, "--out", tmp_path / "a")
    sample("--n", 2, "--seed", 3, "--batch-size", 1, "--no-batch-cond", "--out", tmp_path / "a")
    assert names(tmp_path / "a") == ["000000.png", "000003.png", "000004.png", "ksag.json"]


def test_pictures_of_unknown_origin_are_left_alone(sample, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/000000.png").touch()
    assert "no ksag.json that says what made them" in sample("--n", 2, "--out", tmp_path / "a", code=1)
    assert names(tmp_path / "a") == ["000000.png"]


def test_a_run_that_came_to_nothing_leaves_the_folder_free(sample, tmp_path):
    sample("--attention", "nowhere", "--out", tmp_path / "a", code=1)
    sample("--n", 1, "--out", tmp_path / "a")
    assert names(tmp_path / "a") == ["000000.png", "ksag.json"]


# Stopped, and shared


def wait_for(folder, count, running):
    end = time.monotonic() + 300
    while len(list(folder.glob("*.png"))) < count:
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def same_files(a, b):
    assert names(a) == names(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names(a))


@pytest.fixture
def long(weights, tmp_path):
    """The arguments of a run that takes long enough to be stopped."""
    return ["sample", "--weights", weights, "--device", "cpu", "--steps", 20, "-n", 12, "--batch-size", 2, "--out"]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_what_was_made_before_it_was_stopped_is_kept_and_the_rest_made_later(long, tmp_path, stop):
    folder = tmp_path / "stopped"
    running = process(*long, folder)
    wait_for(folder, 3, running)
    running.send_signal(stop)
    output, _ = running.communicate()
    made = len(list(folder.glob("*.png")))
    assert 3 <= made < 12
    if stop == signal.SIGINT:
        assert running.returncode == 130 and "Traceback" not in output
        assert f"Stopped: {made} of 12 pictures" in output
    before = unchanged(folder)
    invoke(*long, folder)
    assert before.items() <= unchanged(folder).items()
    assert process(*long, tmp_path / "whole").wait() == 0
    for part in folder.glob(".*.part"):  # what a kill leaves of a file that was being written
        part.unlink()
    same_files(folder, tmp_path / "whole")


TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_make_the_folder_of_one(long, tmp_path):
    folder = tmp_path / "two"
    running = process(*long, folder, launcher=TWO)
    wait_for(folder, 3, running)
    launcher = psutil.Process(running.pid)
    for one in (launcher, *launcher.children(recursive=True)):
        one.kill()
    running.communicate()
    assert len(list(folder.glob("*.png"))) < 12
    before = unchanged(folder)
    running = process(*long, folder, launcher=TWO)
    output, _ = running.communicate()
    assert running.returncode == 0, output
    assert output.count("12 pictures in") == 1
    assert before.items() <= unchanged(folder).items()
    bars = [line for line in output.replace("\r", "\n").splitlines() if "picture" in line and "|" in line]
    counts = [int(line.split("|")[-1].split("/")[0]) for line in bars]
    assert counts == sorted(counts) and counts[-1] == 12  # one bar, for all
    assert process(*long, tmp_path / "one").wait() == 0
    for part in folder.glob(".*.part"):
        part.unlink()
    same_files(folder, tmp_path / "one")


@pytest.mark.slow
def test_two_processes_do_not_share_one_file(long, tmp_path):
    running = process(*long, tmp_path / "x.png", launcher=TWO)
    output, _ = running.communicate()
    assert running.returncode != 0 and "several processes write into a folder" in " ".join(output.split())
