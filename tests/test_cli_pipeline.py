"""Does `ksag sample --pipeline` sample Stable Diffusion pipelines from disk? They are tiny and random."""

import pytest
import torch
from diffusers import EDMEulerScheduler
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import ksag
from ksag.adapters import diffusers
from ksag.commands import inputs
from ksag.samplers import sample as sample_latents
from tests import diffusers_pipelines
from tests.commands import READERS, invoke, pixels, text
from tests.single_files import single_file

KINDS = {
    "1.x": diffusers_pipelines.stable_diffusion,
    "2.x": diffusers_pipelines.stable_diffusion_2,
    "XL": diffusers_pipelines.stable_diffusion_xl,
    "inpainting": diffusers_pipelines.stable_diffusion_inpainting,
    "ControlNet": diffusers_pipelines.stable_diffusion_with_controlnet,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → the folder of such a pipeline."""
    made = {}

    def folder(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("pipeline")
            KINDS[kind](path)
            made[kind] = path / "pipe"
        return made[kind]

    return folder


@pytest.fixture
def sample(saved):
    def run(kind, *args, **options):
        return invoke("sample", "--pipeline", saved(kind), "--device", "cpu", "--steps", 3, *args, **options)

    return run


@pytest.fixture
def picture(tmp_path):
    """Left half noise, right half noise too, and a mask that is white on the right."""
    torch.manual_seed(0)
    to_pil_image(torch.rand(3, 24, 32)).save(tmp_path / "picture.png")
    mask = torch.zeros(1, 24, 32)
    mask[..., 16:] = 1
    to_pil_image(mask).save(tmp_path / "mask.png")
    return tmp_path / "picture.png", tmp_path / "mask.png"


@pytest.mark.parametrize("kind", ["2.x", "XL"])
def test_the_picture_is_that_of_the_library(sample, saved, tmp_path, kind):
    sample(kind, "--prompt", "a cat", "--negative-prompt", "a dog", "--size", "32x24", "--cond-scale", 3, "--seed", 4,
           "--clip-skip", 1, "--sag-scale", 1.5, "--sampler", "euler", "--schedule", "karras",
           "--out", tmp_path / "x.png")  # fmt: skip
    import k_diffusion as K

    pipe = diffusers.load(saved(kind))
    denoiser = diffusers.denoiser(pipe)
    cond, uncond = diffusers.conditioning(pipe, "a cat", "a dog", size=(24, 32))
    sigmas = K.sampling.get_sigmas_karras(3, float(denoiser.sigma_min), float(denoiser.sigma_max))
    with ksag.SAGDenoiser(denoiser, 1.5, cond_key=None) as guided:
        args = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
        x = sample_latents("euler", guided, (4, 24 // pipe.vae_scale_factor, 32 // pipe.vae_scale_factor), sigmas, [4], args)
    expected = pil_to_tensor(diffusers.decode(pipe, x, pil=True)[0])
    assert torch.equal(pixels(tmp_path / "x.png"), expected.float())
    assert text(tmp_path / "x.png").startswith(
        "a cat\nNegative prompt: a dog\nSteps: 3, Sampler: Euler, Schedule type: Karras, CFG scale: 3, Size: 32x24, Model: "
    )


@pytest.mark.parametrize("kind", ["2.x", "inpainting"])
def test_a_single_file_with_its_config(saved, picture, tmp_path, kind):
    """2.x predicts v."""
    file = tmp_path / "model.safetensors"
    single_file(diffusers.load(saved(kind)), file)
    start = ["--image", picture[0], "--mask", picture[1], "--strength", 1] if kind == "inpainting" else []
    for source in (file, "--config", saved(kind)), (saved(kind),):
        invoke("sample", "--pipeline", *source, "--prompt", "a cat", *start, "--device", "cpu", "--steps", 2, "--out",
               tmp_path / f"{len(source)}.png")  # fmt: skip
    assert torch.equal(pixels(tmp_path / "3.png"), pixels(tmp_path / "1.png"))
    assert "Model: model," in text(tmp_path / "3.png")


def test_a_folder_goes_by_its_name_wherever_it_lies_and_however_it_is_typed(saved, tmp_path, monkeypatch):
    folder = saved("1.x")
    monkeypatch.chdir(folder)
    assert {inputs.name(typed) for typed in (str(folder), f"{folder}/", ".", f"../{folder.name}/")} == {"pipe"}
    invoke("sample", "--pipeline", ".", "--prompt", "a", "--device", "cpu", "--steps", 2, "--out", tmp_path / "a")
    assert "Model: pipe, Model fingerprint" in text(tmp_path / "a/000000.png")
    assert str(folder.parent) not in text(tmp_path / "a/000000.png") + (tmp_path / "a/ksag.json").read_text()


@pytest.mark.parametrize(("spacing", "name"), [("exponential", "Exponential"), (None, "Uniform")])
def test_the_schedule_is_called_what_it_is(saved, tmp_path, spacing, name):
    pipe = diffusers.load(saved("1.x"))
    if spacing:
        pipe.scheduler = EDMEulerScheduler(sigma_schedule=spacing)
    pipe.save_pretrained(tmp_path / "pipe")
    args = ["sample", "--pipeline", tmp_path / "pipe", "--prompt", "a", "--device", "cpu", "--steps", 2, "--out"]
    invoke(*args, tmp_path / "own.png")
    assert f"Schedule type: {name}," in text(tmp_path / "own.png")
    if spacing:
        invoke(*args, tmp_path / "asked.png", "--schedule", spacing)
        assert torch.equal(pixels(tmp_path / "own.png"), pixels(tmp_path / "asked.png"))


@pytest.mark.parametrize("reader", READERS)
def test_image_tools_read_the_parameters(sample, tmp_path, reader):
    prompt, negative = "a cat, red: yes\nin a garden", "blurry, dark: no\ntext"
    sample("1.x", "--prompt", prompt, "--negative-prompt", negative, "--cond-scale", 3, "--seed", 5, "--out", tmp_path / "x.png")
    *prompts, fields = reader(text(tmp_path / "x.png"))
    assert prompts == [prompt, negative]
    expected = {"Steps": "3", "Sampler": "Euler", "Schedule type": "Uniform", "CFG scale": "3", "Seed": "5", "Model": "pipe"}
    assert expected.items() <= fields.items()


def test_prompts_take_turns_by_seed_and_each_is_as_it_is_alone(sample, tmp_path):
    long = " ".join(["many words"] * 30)
    (tmp_path / "prompts.txt").write_text(f"\na dog\n{long}\n", encoding="utf-8")
    both = ["--prompt", "a cat", "--prompts", tmp_path / "prompts.txt"]
    assert "3 pictures" in sample("1.x", *both, "--batch-size", 3, "--out", tmp_path / "a")
    prompts = [text(tmp_path / f"a/00000{seed}.png").split("\n")[0] for seed in range(3)]
    assert prompts == ["a cat", "a dog", long]
    sample("1.x", "--prompt", "a dog", "--seed", 1, "--out", tmp_path / "dog.png")
    assert (pixels(tmp_path / "a/000001.png") - pixels(tmp_path / "dog.png")).abs().max() <= 1  # of 255
    sample("1.x", "--prompt", long, "--seed", 2, "--out", tmp_path / "long.png")
    assert (pixels(tmp_path / "a/000002.png") - pixels(tmp_path / "long.png")).abs().max() <= 1
    assert (pixels(tmp_path / "a/000001.png") - pixels(tmp_path / "long.png")).abs().max() > 1
    assert "Prompt is ['a cat', 'a dog'," in sample("1.x", "--prompt", "a cat", "--out", tmp_path / "a", code=1)


def test_prompts_of_a_windows_editor(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cät\n", encoding="utf-8-sig")
    sample("1.x", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "x.png")
    assert text(tmp_path / "x.png").startswith("a cät\n")
    for encoding in "utf-16", "latin-1":
        (tmp_path / "prompts.txt").write_text("a cät\n", encoding=encoding)
        output = sample("1.x", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "y.png", code=2)
        assert "prompts.txt: the file is not UTF-8 text. Save it in that encoding" in output


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "own"), [("1.x", 1), ("XL", 2)])
def test_clip_skip_counts_as_a1111_does(sample, saved, tmp_path, kind, own):
    """What leaves out no layer is the model's own; beyond it, each step is one more, as the library leaves them out."""
    from ksag.commands.pipeline import Pipeline

    pipe = diffusers.load(saved(kind))
    for skip in range(1, own + 2):
        model = Pipeline(str(saved(kind)), torch.device("cpu"), torch.float32, prompt=["a cat"], clip_skip=skip)
        expected, _ = diffusers.conditioning(pipe, "a cat", clip_skip=max(0, skip - own))
        assert torch.equal(model.conditioning([0])["cond"]["encoder_hidden_states"], expected["encoder_hidden_states"])
        assert model.fields.get("Clip skip") == (str(skip) if skip > own else None)
    output = sample(kind, "--prompt", "a cat", "--clip-skip", 5, "--out", tmp_path / "x.png", code=2)
    assert "--clip-skip 5: the text encoder has 4 layers" in output


def test_xl_without_a_negative_prompt_is_told_from_an_empty_one(sample, tmp_path):
    sample("XL", "--prompt", "a cat", "--out", tmp_path / "none.png")
    sample("XL", "--prompt", "a cat", "--negative-prompt", "", "--out", tmp_path / "empty.png")
    assert (pixels(tmp_path / "none.png") - pixels(tmp_path / "empty.png")).abs().max() > 5
    assert "Uncond: zeros" in text(tmp_path / "none.png") and "Uncond" not in text(tmp_path / "empty.png")


def test_every_prompt_and_compare_into_a_folder(sample, tmp_path):
    args = ["--prompt", "a cat", "--prompt", "a dog", "--compare", "--zoom", 2, "--one-pass", "--every", 2]
    sample("XL", *args, "--out", tmp_path / "a")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["000000.png", "000001.png", "ksag.json"]
    assert "SAG one pass: True, SAG every: 2" in text(tmp_path / "a/000001.png")


@pytest.mark.parametrize(
    ("kind", "args", "code", "message"),
    [
        ("1.x", [], 2, "--pipeline needs a --prompt"),
        ("1.x", ["--prompt", "a", "--classes", "cat"], 2, "--classes is for k-diffusion models"),
        ("1.x", ["--prompt", "a", "--size", "33x24"], 2, "multiples of 2, such as 32x24"),
        ("1.x", ["--prompt", "a", "--size", "512"], 2, "'512' is not a size: give WIDTHxHEIGHT"),
        ("1.x", ["--prompt", "a", "--strength", "0.5"], 2, "give --image"),
        ("1.x", ["--prompt", "a", "--strength", "0"], 2, "0.0 is not in the range"),
        ("1.x", ["--prompt", "a", "--offload", "--cuda-graphs"], 2, "needs them to stay in place: give one of them"),
        ("1.x", ["--prompt", "a", "--offload"], 2, "from the GPU to the CPU: leave it out on a CPU"),
        ("1.x", ["--prompt", "a", "--shift", "2"], 1, "shift= (--shift) is for flow matching"),
        ("1.x", ["--prompt", "a", "--config", "."], 1, "goes with a single file"),
        ("inpainting", ["--prompt", "a"], 2, "which is for inpainting: give --image and --mask"),
        ("ControlNet", ["--prompt", "a"], 2, "whose ControlNet needs a picture"),
    ],
)
def test_bad_input_is_one_clear_line(sample, tmp_path, kind, args, code, message):
    assert message in sample(kind, *args, "--out", tmp_path / "x.png", code=code)
    assert not (tmp_path / "x.png").exists()


def test_a_pipeline_without_text_encoder_is_one_clear_line(saved, tmp_path):
    """The adapter's TypeError."""
    pipe = diffusers.load(saved("XL"))
    pipe.text_encoder = pipe.text_encoder_2 = None
    pipe.save_pretrained(tmp_path / "pipe")
    args = ["--prompt", "a", "--device", "cpu", "--steps", 2, "--out", tmp_path / "x.png"]
    output = invoke("sample", "--pipeline", tmp_path / "pipe", *args, code=1)
    assert "Error: Expected a Stable Diffusion 1.x, 2.x or XL pipeline, with CLIP text encoders" in output


def test_what_holds_no_prompt_and_no_pipeline(sample, tmp_path):
    (tmp_path / "x.txt").write_text("")
    assert "holds no prompt" in sample("1.x", "--prompts", tmp_path / "x.txt", "--out", tmp_path / "x.png", code=2)
    (tmp_path / "empty").mkdir()
    for source in tmp_path / "empty", tmp_path / "nowhere.safetensors":
        output = invoke("sample", "--pipeline", source, "--prompt", "a", "--device", "cpu", "--out", tmp_path / "x.png", code=1)
        assert source.name in output
