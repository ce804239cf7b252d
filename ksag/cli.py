"""The commands `ksag demo` and `ksag sample`."""

import difflib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

import ksag
from ksag import picture
from ksag.samplers import SAMPLERS, sample

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def nearest(word: str, words: Sequence[str]) -> str:
    return " or ".join(difflib.get_close_matches(word, words, n=3, cutoff=0.4) or words)


class Sampler(click.ParamType):
    """A sampler's name; an unknown one gets the nearest ones."""

    name = "name"

    def convert(self, value: str, param: Any, ctx: Any) -> str:
        if value not in SAMPLERS:
            self.fail(f"{value!r} is no sampler of k-diffusion. Did you mean {nearest(value, SAMPLERS)}?", param, ctx)
        return value


class Device(click.ParamType):
    """A device that works here; auto picks a GPU where there is one."""

    name = "device"

    def convert(self, value: Any, param: Any, ctx: Any) -> torch.device:
        if value == "auto":
            value = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            return torch.empty(0, device=value).device
        except (RuntimeError, AssertionError) as error:
            self.fail(f"{value!r} cannot be used here: {str(error).splitlines()[0]}", param, ctx)


class Commands(click.Group):
    """Shows the library's errors about bad input as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error


def sampling_options(command: Callable) -> Callable:
    for option in reversed((
        click.option("--sampler", type=Sampler(), default="dpmpp_2m", help=f"One of {', '.join(SAMPLERS)}."),
        click.option("--steps", type=click.IntRange(2), default=24,
                     help="Sampling steps; model calls for dpm_fast; dpm_adaptive chooses its own."),
        click.option("--sag-scale", type=float, default=2.0, help="Strength of Self-Attention Guidance; 0 is none."),
        click.option("--blur-sigma", type=float, default=2.0, help="Blur of what the model attends to, in latent pixels."),
        click.option("--cond-scale", type=float, default=2.0, help="Strength of classifier-free guidance; 1 is none."),
        click.option("--device", type=Device(), default="auto", help="cpu, cuda, mps, or auto: a GPU where there is one."),
    )):  # fmt: skip
        command = option(command)
    return command


class Model:
    """A k-diffusion model from a safetensors file, and what its config says about sampling it."""

    def __init__(self, weights: Path | None, device: torch.device):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # clip, imported by k-diffusion
            from ksag import zoo
        path = zoo.CIFAR10 if weights is None else weights
        self.name, self.device = path.stem, device
        self.denoiser, config = zoo.load(path, device), zoo.load_config(path)
        self.config = config["model"]
        self.shape = (self.config["input_channels"], *self.config["input_size"])
        self.classes = config["dataset"].get("classes") or [str(i) for i in range(config["dataset"]["num_classes"])]

    def sigmas(self, steps: int) -> Tensor:
        import k_diffusion as K

        return K.sampling.get_sigmas_karras(steps, self.config["sigma_min"], self.config["sigma_max"], device=self.device)

    def class_names(self, wanted: str | None, n: int) -> list[str]:
        """n class names: the wanted ones (names or numbers, by commas) in turn, else all in turn."""
        names = []
        for name in wanted.split(",") if wanted else self.classes or [""]:
            name = name.strip()
            if name.isdigit() and int(name) < len(self.classes):
                name = self.classes[int(name)]
            if name and name not in self.classes:
                has = f"did you mean {nearest(name, self.classes)}?" if self.classes else "it has no classes."
                raise click.UsageError(f"--classes: {name!r} is no class of {self.name}: {has}")
            names.append(name)
        return [names[i % len(names)] for i in range(n)]

    def extra_args(self, names: Sequence[str], cond_scale: float) -> dict[str, Any]:
        if not self.classes:
            return {}
        from ksag import zoo

        cond = zoo.one_hot([self.classes.index(name) for name in names], len(self.classes), self.device)
        return {"cond": cond, "uncond": torch.zeros_like(cond), "cond_scale": cond_scale}


def run(
    desc: str, sampler: str, guided: ksag.SAGDenoiser, model: Model, steps: int, seeds: Sequence[int], args: dict[str, Any]
) -> Tensor:
    """The samples, on the CPU, under a progress bar."""
    total = None if sampler in ("dpm_fast", "dpm_adaptive") else steps
    with tqdm(total=total, desc=desc, unit="step") as bar:
        return sample(sampler, guided, model.shape, model.sigmas(steps), seeds, args, lambda _: bar.update()).cpu()


def parameters(
    model: Model, names: Sequence[str], sampler: str, steps: int, cond_scale: float, seed: int, sag_scale: float, blur_sigma: float
) -> str:
    """What made a picture, in the form that image tools read from a PNG's "parameters"."""
    _, h, w = model.shape
    return (
        f"{', '.join(names)}\nSteps: {steps}, Sampler: {sampler}, Schedule type: Karras, CFG scale: {cond_scale:g}, Seed: {seed}, "
        f"Size: {w}x{h}, Model: {model.name}, SAG scale: {sag_scale:g}, SAG blur sigma: {blur_sigma:g}, "
        f"Version: ksag {ksag.__version__}"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(ksag.__version__)
def main() -> None:
    """Self-Attention Guidance for k-diffusion samplers.

    `ksag demo` shows what it does; `ksag sample` makes pictures with it.
    """


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("ksag-demo.png"), help="The picture to write.")
@click.option("--n", type=click.IntRange(1, 20), default=8, help="Samples: the picture's columns.")
@click.option("--seed", type=click.IntRange(0), default=100, help="The first sample's seed; the next sample has the next.")
@sampling_options
def demo(
    out: Path,
    n: int,
    sampler: str,
    steps: int,
    sag_scale: float,
    blur_sigma: float,
    cond_scale: float,
    seed: int,
    device: torch.device,
) -> None:
    """Sample the bundled model with and without SAG from the same noise, into one picture.

    Needs no file, no network and no GPU.
    """
    if sag_scale == 0:
        raise click.UsageError("--sag-scale 0 is no guidance, so there would be nothing to compare. The default is 2.")
    picture.check_writable(out)
    model = Model(None, device)
    names, seeds = model.class_names(None, n), range(seed, seed + n)
    args = model.extra_args(names, cond_scale)

    with ksag.SAGDenoiser(model.denoiser, sag_scale, blur_sigma, cond_key="mapping_cond") as guided:
        guided(torch.randn(n, *model.shape, device=device), model.sigmas(2)[:1].expand(n), **args)  # a first call is slower
        start = time.perf_counter()
        plain = run("without SAG", sampler, guided, model, steps, seeds, {**args, "sag_scale": 0.0})
        between = time.perf_counter()
        with guided.trace() as trace:
            with_sag = run("with SAG", sampler, guided, model, steps, seeds, args)
        end = time.perf_counter()

    settings = (
        f"{sampler}, {steps} steps, sag_scale {sag_scale:g}, blur_sigma {blur_sigma:g}, cond_scale {cond_scale:g}, seed {seed}"
    )
    image = picture.demo(plain, with_sag, torch.stack([step.mask for step in trace]).mean(0), names, settings)
    picture.save(image, out, parameters(model, names, sampler, steps, cond_scale, seed, sag_scale, blur_sigma))
    click.echo(f"{settings}, {device_name(device)}")
    click.echo(f"{between - start:.1f} s without SAG, {end - between:.1f} s with SAG")
    click.echo(f"The picture is in {out.resolve()}")


@main.command("sample")
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), show_default="the bundled CIFAR-10 model",
              help="A k-diffusion model as safetensors, with its config in the metadata.")  # fmt: skip
@click.option("--classes", show_default="all in turn", help="Class names or numbers, such as cat,dog,7; taken in turn.")
@click.option("--n", type=click.IntRange(1), default=10, help="How many samples.")
@click.option("--batch-size", type=click.IntRange(1), default=32, help="How many at a time; it does not change the pictures.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The first sample's seed; the next sample has the next.")
@sampling_options
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="What the model computes in.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("ksag-samples.png"),
              help="A .png file for one grid, or a folder for one PNG per sample.")  # fmt: skip
def sample_command(
    weights: Path | None, classes: str | None, n: int, batch_size: int, sampler: str, steps: int, sag_scale: float,
    blur_sigma: float, cond_scale: float, seed: int, device: torch.device, dtype: str, out: Path,
) -> None:  # fmt: skip
    """Sample a k-diffusion model with SAG into PNGs.

    The same seed gives the same picture. Every PNG carries its parameters in its text chunk, where image tools look.
    """
    picture.check_writable(out)
    model = Model(weights, device)
    names = model.class_names(classes, n)
    autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
    batches = []
    with ksag.SAGDenoiser(model.denoiser, sag_scale, blur_sigma, cond_key="mapping_cond") as guided, autocast:
        for first in range(0, n, batch_size):
            last = min(first + batch_size, n)
            args, seeds = model.extra_args(names[first:last], cond_scale), range(seed + first, seed + last)
            batches.append(run(f"samples {first + 1}-{last} of {n}", sampler, guided, model, steps, seeds, args))
    samples = torch.cat(batches)

    def describe(names: Sequence[str], seed: int) -> str:
        return parameters(model, names, sampler, steps, cond_scale, seed, sag_scale, blur_sigma)

    if out.suffix:
        picture.save(picture.grid(samples, columns=min(n, 10)), out, describe(names, seed))
    else:
        for i, (x, name) in enumerate(zip(samples, names, strict=True)):
            file = out / f"{seed + i:05d}{f'-{name}' if name else ''}.png"
            picture.save(picture.to_image(x), file, describe([name], seed + i))
    click.echo(f"{n} samples in {out.resolve()}")
