"""Does `ksag sample` fill a folder by seed, whatever stops it, and however many processes share the work?"""

import contextlib
import json
import multiprocessing
import os
import signal
import time

import click
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import ksag.commands.sample
from ksag.commands.cli import main
from ksag.commands.folder import Folder
from ksag.commands.processes import Process, this_process
from ksag.commands.sample import into_folder
from ksag.commands.sampling import Sampling
from tests.commands import invoke, pixels, process, save_small_model, text
from tests.emoji_packages import ROOT

fcntl = pytest.importorskip("fcntl")


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


@pytest.mark.slow
def test_dpm_adaptive_whose_steps_are_a_batchs_makes_pictures_one_by_one(sample, tmp_path):
    sample("--n", 2, "--out", tmp_path / "a", "--sampler", "dpm_adaptive", "--sag-scale", 0)
    sample("--n", 1, "--seed", 1, "--out", tmp_path / "b", "--sampler", "dpm_adaptive", "--sag-scale", 0)
    assert torch.equal(pixels(tmp_path / "a/000001.png"), pixels(tmp_path / "b/000001.png"))
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


class Clock:
    """Used in place of `time`: each look at the folder is 20 minutes later, and the other process has made what it had by then."""

    def __init__(self, path, arrivals):
        self.now, self.path, self.arrivals = 0.0, path, arrivals

    def monotonic(self):
        return self.now

    def sleep(self, _):
        self.now += 1200
        for seed, at in self.arrivals.items():
            if at <= self.now:
                (self.path / f"{seed:06d}.png").touch()


@pytest.mark.parametrize(("arrivals", "missing"), [({2: 3000, 3: 6000}, 0), ({2: 3000, 3: 9000}, 1), ({}, 2)])
def test_the_main_process_waits_as_long_as_pictures_come(tmp_path, monkeypatch, arrivals, missing):
    monkeypatch.setattr(ksag.commands.sample, "time", Clock(tmp_path, arrivals))
    with Folder(tmp_path, {}) as folder, contextlib.ExitStack() as expected:
        if missing:
            text = f"made no picture for 60 minutes, and {missing} of 4 are missing"
            expected.enter_context(pytest.raises(click.ClickException, match=text))
        process, bar = Process(0, 2, torch.device("cpu")), tqdm(total=4, disable=True)
        into_folder(folder, range(4), 2, process, lambda seeds: [Image.new("RGB", (1, 1)) for _ in seeds], str, bar)
    assert len(list(tmp_path.glob("*.png"))) == 4 - missing
    page = " ".join((ROOT / "docs/sampling.md").read_text().split())
    assert "when the other processes have made no picture for 60 minutes" in page


def test_a_process_is_what_the_launcher_says(monkeypatch):
    for environment, expected in (({}, (0, 1)), ({"RANK": "1"}, (0, 1)), ({"WORLD_SIZE": "4", "RANK": "3"}, (3, 4))):
        with monkeypatch.context() as patch:
            for name in "RANK", "WORLD_SIZE":
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            assert this_process(torch.device("cpu"))[:2] == expected
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "2", "-1":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ValueError, match="WORLD_SIZE is 2, so RANK must be 0 to 1, got"):
            this_process(torch.device("cpu"))
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="got none"):
        this_process(torch.device("cpu"))


def test_processes_make_the_batches_of_one(tmp_path):
    made = []

    def make(seeds):
        made.append(list(seeds))
        return [Image.new("RGB", (1, 1)) for _ in seeds]

    for rank in 1, 0:
        process = Process(rank, 2, torch.device("cpu"))
        with Folder(tmp_path, {}) as folder:
            into_folder(folder, range(7), 2, process, make, str, tqdm(total=7, disable=True))
    assert made == [[2, 3], [6, 6], [0, 1], [4, 5]] and len(list(tmp_path.glob("*.png"))) == 7
    made.clear()
    for rank in 1, 0:
        process = Process(rank, 2, torch.device("cpu"))
        with Folder(tmp_path, {}) as folder:
            into_folder(folder, range(10, 13), 8, process, make, str, tqdm(total=3, disable=True))
    assert made == [[12, 12], [10, 11]]  # smaller batches rather than an idle process


OTHERS = [
    (["--steps", 3], "Steps is 2 there, 3 here"),
    (["--sag-scale", 1], "SAG scale is 0.5 there, 1 here"),
    (["--classes", "dog"], "Prompt is ['bird', 'cat', 'dog'] there, ['dog'] here"),
    (["--compare"], "Compare is not set there, plain and guided here"),
    (["--pag-scale", 1], "PAG scale is not set there, 1 here"),
    (["--sag-scale", 0, "--pag-scale", 1], "SAG blur sigma is 2 there, not set here"),
    (["--cfg-rule", "rescale:0.7"], "CFG rule is plain there, rescale(phi=0.7) here"),
    (["--dtype", "bfloat16"], "Precision is float32 there, bfloat16 here"),
    (["--schedule", "exponential"], "Schedule type is Karras there, Exponential here"),
]


def test_other_settings_in_the_same_folder_are_refused(sample, tmp_path):
    sample("--n", 1, "--out", tmp_path / "a")
    before = unchanged(tmp_path / "a")
    for other, difference in OTHERS:
        assert difference in sample("--n", 2, *other, "--out", tmp_path / "a", code=1)
    assert unchanged(tmp_path / "a") == before


def test_an_empty_setting_differs_from_none(tmp_path):
    match = "Negative prompt is not set there, empty here"
    with Folder(tmp_path, {"Negative prompt": None}), pytest.raises(ValueError, match=match):
        Folder(tmp_path, {"Negative prompt": ""})


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
    assert "but no ksag.json with their settings" in sample("--n", 2, "--out", tmp_path / "a", code=1)
    assert names(tmp_path / "a") == ["000000.png"]


def test_a_run_that_came_to_nothing_leaves_the_folder_free(sample, tmp_path):
    sample("--attention", "nowhere", "--out", tmp_path / "a", code=1)
    sample("--n", 1, "--out", tmp_path / "a")
    assert names(tmp_path / "a") == ["000000.png", "ksag.json"]


@pytest.mark.parametrize("content", ["", '{"Steps": ', "3", "[1]"])
def test_settings_that_are_damaged_are_an_error_beside_pictures_and_free_without(tmp_path, content):
    (tmp_path / "000000.png").touch()
    (tmp_path / "ksag.json").write_text(content)
    with pytest.raises(ValueError, match=r"ksag.json is damaged, so the settings of the pictures are unknown. Give another folder"):
        Folder(tmp_path, {"Steps": "2"})
    (tmp_path / "000000.png").unlink()
    with Folder(tmp_path, {"Steps": "2"}):
        assert json.loads((tmp_path / "ksag.json").read_text()) == {"Steps": "2"}


# Claimed


def test_a_folder_in_use_is_refused_for_other_settings_before_it_holds_a_picture(tmp_path):
    with Folder(tmp_path, {"Steps": "2"}), Folder(tmp_path, {"Steps": "2"}):
        with pytest.raises(ValueError, match="is in use with other settings: Steps is 2 there, 3 here"):
            Folder(tmp_path, {"Steps": "3"})
        assert json.loads((tmp_path / "ksag.json").read_text()) == {"Steps": "2"}
    with Folder(tmp_path, {"Steps": "3"}):  # nobody uses it, and nothing was made
        assert json.loads((tmp_path / "ksag.json").read_text()) == {"Steps": "3"}


def claim(path, steps, together, results):
    """One of several processes that claim a folder at the same moment."""
    together.wait()
    try:
        folder = Folder(path, {"Steps": str(steps)})
    except ValueError:
        results.put((steps, False))
    else:
        results.put((steps, json.loads((path / "ksag.json").read_text())["Steps"] == str(steps)))
        assert folder.path
    together.wait()


@pytest.mark.slow
def test_processes_that_start_together_agree_on_one_setting(tmp_path):
    fork = multiprocessing.get_context("fork")
    for turn in range(3):
        path = tmp_path / str(turn)
        path.mkdir()
        together, results = fork.Barrier(6), fork.Queue()
        running = [fork.Process(target=claim, args=(path, i % 3, together, results)) for i in range(6)]
        for one in running:
            one.start()
        found = [results.get(timeout=60) for _ in running]
        for one in running:
            one.join()
        assert len({steps for steps, succeeded in found if succeeded}) == 1, found
        assert all(one.exitcode == 0 for one in running)


def claim_half(path):
    file = (path / "ksag.json").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write('{"Steps": ')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_claim_whose_writer_was_killed_is_free(tmp_path):
    killed = multiprocessing.get_context("fork").Process(target=claim_half, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and (tmp_path / "ksag.json").read_text() == '{"Steps": '
    with Folder(tmp_path, {"Steps": "2"}):
        assert json.loads((tmp_path / "ksag.json").read_text()) == {"Steps": "2"}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with Folder(tmp_path, {"Steps": "2"}), Folder(tmp_path, {"Steps": "2"}):
        pass
    with pytest.raises(ValueError, match="is in use with other settings"):
        Folder(tmp_path, {"Steps": "3"})


# Stopped, and shared

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ksag.commands.sample", "tests.commands"])
"""Processes that have imported everything: each starts in no time."""


def command(args, env, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    ksag.commands.sample.PATIENCE = 6.0  # so that no test waits for long
    main([str(arg) for arg in args])


class Running:
    """The command in a process of its own."""

    def __init__(self, output, *args, **env):
        self.output = output
        self.process = FORKS.Process(target=command, args=(args, env, output))
        self.process.start()

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait(self):
        """The exit status, and the output in one line."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.text()
        assert "Traceback" not in self.text()
        return self.process.exitcode, " ".join(self.text().split())

    def wait_until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def wait_for(self, folder, count):
        self.wait_until(lambda: len(list(folder.glob("*.png"))) >= count)


TWO_RANKS = [{"WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]


def same_pictures(a, b):
    """A kill leaves the part of a file that was being written, under a hidden name."""
    made = [name for name in names(a) if not name.startswith(".")]
    assert made == names(b)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in made)


@pytest.fixture
def long(weights, tmp_path):
    """Starts a run that takes long enough to be stopped."""
    args = ("sample", "--weights", weights, "--device", "cpu", "--steps", 20, "-n", 12, "--batch-size", 2, "--out")
    started = []

    def start(folder, *more, **env):
        started.append(Running(tmp_path / f"output {len(started)}", *args, tmp_path / folder, *more, **env))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()


@pytest.mark.slow
def test_the_second_of_two_commands_with_other_settings_is_refused(long, tmp_path):
    running = [long("a", "--sag-scale", scale) for scale in (0.5, 1)]
    done = sorted(one.wait() for one in running)
    assert [code for code, _ in done] == [0, 1] and "other settings: SAG scale is" in done[1][1]
    scales = {text(file).split("SAG scale: ")[1].split(",")[0] for file in (tmp_path / "a").glob("*.png")}
    assert scales == {json.loads((tmp_path / "a/ksag.json").read_text())["SAG scale"]}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_what_was_made_before_it_was_stopped_is_kept_and_the_rest_made_later(long, tmp_path, stop):
    running = long("stopped")
    running.wait_for(tmp_path / "stopped", 3)
    os.kill(running.process.pid, stop)
    code, output = running.wait()
    made = len(list((tmp_path / "stopped").glob("*.png")))
    assert 3 <= made < 12
    if stop == signal.SIGINT:
        assert code == 130 and f"Stopped: {made} of 12 pictures" in output
    before = unchanged(tmp_path / "stopped")
    assert long("stopped").wait()[0] == long("whole").wait()[0] == 0
    assert before.items() <= unchanged(tmp_path / "stopped").items()
    same_pictures(tmp_path / "stopped", tmp_path / "whole")


TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.slow
def test_two_processes_that_are_killed_and_started_again_make_the_folder_of_one(long, weights, tmp_path):
    running = [long("two", **env) for env in TWO_RANKS]
    running[0].wait_for(tmp_path / "two", 3)
    for one in running:
        one.process.kill()
        one.process.join()
    before = unchanged(tmp_path / "two")
    assert len(before) < 13
    launched = ("sample", "--weights", weights, "--device", "cpu", "--steps", 20, "-n", 12, "--batch-size", 2, "--out")
    launcher = process(*launched, tmp_path / "two", launcher=TWO)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0 and output.count("12 pictures in") == 1, output
    assert before.items() <= unchanged(tmp_path / "two").items()
    bars = [line for line in output.replace("\r", "\n").splitlines() if "picture" in line and "|" in line]
    counts = [int(line.split("|")[-1].split("/")[0]) for line in bars]
    assert counts == sorted(counts) and counts[-1] == 12  # one bar, for all
    assert long("one").wait()[0] == 0
    same_pictures(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_that_lost_a_process_ends_with_what_is_missing(long, tmp_path):
    """Under a launcher that leaves the others alone, as a cluster's may."""
    running = [long("a", **env) for env in TWO_RANKS]
    running[1].wait_for(tmp_path / "a", 1)
    running[1].process.kill()
    code, output = running[0].wait()
    missing = 12 - len(list((tmp_path / "a").glob("*.png")))
    assert missing > 0 and code == 1 and f"{missing} of 12 are missing in" in output


@pytest.mark.slow
def test_two_processes_do_not_share_one_file(long):
    for code, output in [one.wait() for one in [long("x.png", **env) for env in TWO_RANKS]]:
        assert code == 2 and "several processes write into a folder" in output
