"""How is a denoiser of emoji trained, which is to become the bundled model?  `python scripts/train_emoji.py --data emoji`

Trains the k-diffusion model that `--config` describes on the pictures that `make_emoji.py` wrote, on a GPU where there is
one, or on several: `torchrun --standalone --nproc-per-node 4 scripts/train_emoji.py --data emoji`. It writes into `--out`:
`checkpoint.pt` (run the same command again to go on from it), `curve.json`, the held-out loss along the run, and
`emoji.safetensors`: the fp16 weights of the average and the step with the lowest held-out loss, with the config and the
training record in the file's metadata, which is the form that k-diffusion and `ksag.zoo` load.
"""

import copy
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import k_diffusion as K
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ksag import zoo


@dataclass(frozen=True)
class Pictures:
    """Images (n, 3, h, w) uint8, and for each its category, its style, and whether it may be mirrored."""

    images: Tensor
    categories: Tensor
    styles: Tensor
    mirror: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: Tensor) -> "Pictures":
        return Pictures(self.images[which], self.categories[which], self.styles[which], self.mirror[which])

    def to(self, device: torch.device) -> "Pictures":
        return Pictures(*(t.to(device) for t in (self.images, self.categories, self.styles, self.mirror)))


def load_pictures(folder: Path, categories: list[str], styles: list[str]) -> tuple[Pictures, Pictures]:
    """The pictures of these styles to train on, and those held out."""
    index = json.loads((folder / "index.json").read_text())
    size, columns = index["size"], index["columns"]
    images, rows = [], []
    for style in styles:
        described = index["pictures"][style]
        sheet = np.asarray(Image.open(folder / f"{style}.webp").convert("RGB"))
        cells = sheet.reshape(-1, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        images.append(cells[: len(described)])
        rows += [(categories.index(p["category"]), styles.index(style), p["mirror"], p["held_out"]) for p in described]
    category, style_number, mirror, held_out = torch.tensor(rows).unbind(1)
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    pictures = Pictures(pixels, category, style_number, mirror.bool())
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{folder} holds out {held_out.sum()} of {len(held_out)} pictures; training needs some, and others to judge by."
        )
    return pictures[~held_out.bool()], pictures[held_out.bool()]


def to_reals(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def condition(pictures: Pictures, dataset: dict) -> Tensor:
    """One-hot category beside one-hot style, (b, categories + styles); a dropped one is all zeros."""

    def keep(dropout_rate: float) -> Tensor:
        return torch.rand(len(pictures), 1, device=pictures.images.device) >= dropout_rate

    category = F.one_hot(pictures.categories, len(dataset["categories"])) * keep(dataset["category_dropout_rate"])
    style = F.one_hot(pictures.styles, len(dataset["styles"])) * keep(dataset["style_dropout_rate"])
    return (torch.cat([category, style], dim=1) * keep(dataset["cond_dropout_rate"])).float()


def matrices(rows: list[list[Tensor | float]], like: Tensor) -> Tensor:
    """A batch of matrices (b, n, m) from rows of numbers and of vectors (b,)."""
    return torch.stack([torch.stack([x + torch.zeros_like(like) for x in row], dim=-1) for row in rows], dim=-2)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    return matrices([[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]], x)


def rotation(angle: Tensor) -> Tensor:
    sin, cos = angle.sin(), angle.cos()
    return matrices([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]], angle)


def translation(x: Tensor, y: Tensor) -> Tensor:
    return matrices([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]], x)


def augment(reals: Tensor, mirror: Tensor, prob: float, scale=2**0.2, aniso=2**0.2, trans=1 / 8) -> tuple[Tensor, Tensor]:
    """`K.augmentation.KarrasAugmentationPipeline` for a batch, on its device: images, and what `aug_cond` says of them (b, 9).

    Where an image may not be mirrored, it is not flipped either way.
    """
    b, device = reals.shape[0], reals.device

    def sometimes(values: Tensor) -> Tensor:
        return values * (torch.rand(b, device=device) < prob)

    def normal() -> Tensor:
        return torch.randn(b, device=device)

    def angle() -> Tensor:
        return (torch.rand(b, device=device) * 2 - 1) * math.pi

    def coin() -> Tensor:
        return torch.randint(2, [b], device=device) * mirror

    x_flip, y_flip = coin(), sometimes(coin())
    size, turn = sometimes(normal()), sometimes(angle())
    axis, stretch = angle(), sometimes(normal())
    shift = torch.rand(b, device=device) < prob
    x_shift, y_shift = normal() * shift, normal() * shift
    forward = scaling(1.0 - 2 * x_flip, 1.0 - 2 * y_flip)
    forward = forward @ scaling(scale**size, scale**size) @ rotation(-turn)
    forward = forward @ rotation(axis) @ scaling(aniso**stretch, aniso**-stretch) @ rotation(-axis)
    forward = forward @ translation(2 * trans * x_shift, 2 * trans * y_shift)  # the grid is 2 wide
    grid = F.affine_grid(torch.linalg.inv_ex(forward).inverse[:, :2], list(reals.shape), align_corners=False)
    images = F.grid_sample(reals, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    said = [x_flip, y_flip, size, turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin(), x_shift, y_shift]
    return images, torch.stack([s.float() for s in said], dim=1)


def join_processes() -> tuple[int, int]:
    """This process's number, and how many there are: one, or as many as torchrun started, each with its share of the batch."""
    if "RANK" not in os.environ:
        return 0, 1
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def first_says(processes: int, *values: float) -> list[float]:
    """The first process's values, in all of them: clocks differ, and all must end at the same step."""
    said = torch.tensor(values, dtype=torch.float64)
    if processes > 1:
        torch.distributed.broadcast(said, 0)
    return said.tolist()


def average_gradients(parameters: list[Tensor], processes: int) -> None:
    if processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = (flat / processes).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)])


def inference_config(source: dict) -> dict:
    """The same model without dropout (k-diffusion's attention would drop at inference too) and without `aug_cond`."""
    return source | {"model": source["model"] | {"augment_wrapper": False, "augment_prob": 0.0, "dropout_rate": 0.0}}


def inference_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights where `aug_cond` is zero: its columns of the mapping are left out."""
    if not isinstance(model, K.augmentation.KarrasAugmentWrapper):
        return dict(model.state_dict())
    state = dict(model.inner_model.state_dict())
    state["mapping_cond.weight"] = state["mapping_cond.weight"][:, 9:]
    return state


def ema_gamma(sigma_rel: float) -> float:
    """The exponent of the power-function EMA of this relative width (Karras et al. 2024, arXiv:2312.02696, eq. 123)."""
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def learning_rate(done: float, step: int, peak: float, warmup: int) -> float:
    """A cosine over the part of the run that is done, 0 to 1, times the warm-up."""
    return peak * min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


@torch.no_grad()
def held_out_loss(
    denoiser: K.layers.Denoiser, sample_density, pictures: Pictures, dataset: dict, autocast, draws: int = 4
) -> float:
    """Mean loss over the held-out pictures with the same noise, noise levels (stratified) and dropping for every model."""
    devices = [pictures.images.device] if pictures.images.is_cuda else []
    reals, losses = to_reals(pictures.images), []
    with torch.random.fork_rng(devices), autocast():
        torch.manual_seed(0)
        for _ in range(draws):
            with K.utils.enable_stratified():
                sigma = sample_density([len(pictures)], device=reals.device)
            parts = zip(*(t.split(256) for t in (reals, torch.randn_like(reals), sigma, condition(pictures, dataset))), strict=True)
            losses += [denoiser.loss(*part, mapping_cond=cond).float() for *part, cond in parts]
    return torch.cat(losses).mean().item()


@click.command(help=__doc__)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="The folder that make_emoji.py wrote.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    show_default=True,
    default=Path(__file__).with_name("emoji.json"),
    help="A k-diffusion config.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/emoji"), show_default=True)
@click.option("--steps", default=20_000, show_default=True)
@click.option("--minutes", type=float, help="Train for so long instead of so many steps.")
@click.option("--batch-size", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=1_000, show_default=True, help="Steps between checkpoints and held-out losses.")
@click.option("--pause-after", type=float, default=math.inf, help="Write a checkpoint and stop after so many seconds.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(data, config, out, steps, minutes, batch_size, seed, save_every, pause_after, compiled):
    started = time.monotonic()
    rank, processes = join_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    source = json.loads(config.read_text())
    config, plain_config = K.config.load_config(source), K.config.load_config(inference_config(source))
    dataset, opt = config["dataset"], config["optimizer"]
    training, held_out = (p.to(device) for p in load_pictures(data, dataset["categories"], dataset["styles"]))

    torch.manual_seed(seed)
    model = K.config.make_model(config).to(device, memory_format=torch.channels_last)
    denoiser = K.config.make_denoiser_wrapper(config)(model)
    judged = K.config.make_model(plain_config).to(device, memory_format=torch.channels_last).eval()
    sample_density = K.config.make_sample_density(config["model"])
    gammas = {str(s): ema_gamma(s) for s in config["ema_sched"]["sigma_rel"]}
    emas = nn.ModuleDict({name.replace(".", "_"): copy.deepcopy(model).requires_grad_(False) for name in gammas})
    parameters: list[Tensor] = list(model.parameters())  # once: to walk through the modules takes longer than to update them
    averages: list[list[Tensor]] = [list(ema.parameters()) for ema in emas.values()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=opt["lr"],
        betas=opt["betas"],
        eps=opt["eps"],
        weight_decay=opt["weight_decay"],
        fused=device.type == "cuda",
    )
    step, seconds = 0, 0.0
    curve: list[dict] = []
    best: dict[str, Any] = {"loss": math.inf}

    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        emas.load_state_dict(state["emas"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, curve, best = state["step"], state["seconds"], state["curve"], state["best"]
        tqdm.write(f"going on from step {step}")
    torch.manual_seed(seed + rank + processes * step)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()

    def elapsed() -> float:
        return seconds + time.monotonic() - started

    def done() -> float:
        return elapsed() / (60 * minutes) if minutes else step / steps

    def judge() -> None:
        """Note the held-out loss of every average, and keep the best weights so far."""
        nonlocal best
        losses = {}
        for name, ema in zip(gammas, emas.values(), strict=True):
            judged.load_state_dict(inference_weights(ema))
            averaged = K.config.make_denoiser_wrapper(plain_config)(judged)
            losses[name] = held_out_loss(averaged, sample_density, held_out, dataset, autocast)
            if losses[name] < best["loss"]:
                weights = {key: tensor.clone() for key, tensor in inference_weights(ema).items()}
                best = {"loss": losses[name], "sigma_rel": name, "step": step, "weights": weights}
        curve.append({"step": step, "seconds": round(elapsed(), 1), "training_loss": running.item(), "held_out_loss": losses})
        (out / "curve.json").write_text(json.dumps(curve, indent=1))
        said = ", ".join(f"{loss:.5f} ({name})" for name, loss in losses.items())
        tqdm.write(f"step {step}: {elapsed():.0f} s, training loss {running.item():.5f}, held-out loss {said}")

    def save_checkpoint() -> None:
        state = {
            "model": model.state_dict(),
            "emas": emas.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": elapsed(),
            "curve": curve,
            "best": best,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    loss_fn = torch.compile(denoiser.loss) if compiled else denoiser.loss
    running = torch.tensor(math.nan, device=device)
    total = None if minutes else steps
    progress = tqdm(total=total, initial=step, desc="training", mininterval=5, disable=rank > 0)
    part, pause = first_says(processes, done(), False)
    while part < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(part, step, opt["lr"], config["lr_sched"]["warmup_steps"])
        batch = training[torch.randint(len(training), [batch_size // processes], device=device)]
        reals, aug_cond = augment(to_reals(batch.images), batch.mirror, config["model"]["augment_prob"])
        reals = reals.contiguous(memory_format=torch.channels_last)
        cond = {"mapping_cond": condition(batch, dataset)}
        if config["model"]["augment_wrapper"]:
            cond["aug_cond"] = aug_cond
        with K.utils.enable_stratified(rank, processes):
            sigma = sample_density([len(batch)], device=device)
        with autocast():
            loss = loss_fn(reals, torch.randn_like(reals), sigma, **cond).mean()
        loss.backward()
        average_gradients(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        for gamma, average in zip(gammas.values(), averages, strict=True):
            torch._foreach_lerp_(average, parameters, 1 - (1 - 1 / step) ** (gamma + 1))
        running = torch.where(running.isnan(), loss.detach(), running.lerp(loss.detach(), 0.01))
        if step % 100 == 0:
            progress.set_postfix(loss=f"{running.item():.4f}", refresh=False)  # waits for the GPU, so that time is its time
        part, pause = first_says(processes, done(), time.monotonic() - started > pause_after)
        if rank == 0 and part < 1 and (pause or step % save_every == 0):
            judge()
            save_checkpoint()
        if part < 1 and pause:
            tqdm.write(f"paused at step {step}; the same command goes on")
            return

    if processes > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    judge()
    record = {
        "steps": step,
        "batch_size": batch_size,
        "processes": processes,
        "seed": seed,
        "seconds": round(elapsed()),
        "augment_prob": config["model"]["augment_prob"] if config["model"]["augment_wrapper"] else 0.0,
        "dropout_rate": config["model"]["dropout_rate"],
        "training_loss": round(running.item(), 5),
        "held_out_loss": {name: round(loss, 5) for name, loss in curve[-1]["held_out_loss"].items()},
        "best": {"step": best["step"], "ema_sigma_rel": float(best["sigma_rel"]), "held_out_loss": round(best["loss"], 5)},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    path = out / "emoji.safetensors"
    zoo.save(best["weights"], path, inference_config(source), record)
    tqdm.write(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): {json.dumps(record)}")


if __name__ == "__main__":
    main()
