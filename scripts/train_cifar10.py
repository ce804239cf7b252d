"""How is the bundled CIFAR-10 denoiser trained?  `python scripts/train_cifar10.py --data cifar10.tar.xz`

Trains the k-diffusion model that `--config` describes, on a GPU where there is one, and writes into `--out`:
`checkpoint.pt` (run the same command again to go on from it) and, at the end, `cifar10.safetensors`: the fp16 EMA weights
with the config and the training record in the file's metadata, which is the form that k-diffusion and `ksag.zoo` load.
"""

import copy
import io
import json
import math
import os
import tarfile
import time
from pathlib import Path

import click
import k_diffusion as K
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ksag import zoo


def load_split(path: Path, split: str, classes: list[str]) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,), from a tar of `split/class/name` files or torchvision's folder."""
    if path.is_dir():
        dataset = torchvision.datasets.CIFAR10(str(path), train=split == "train")
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tqdm(tar, desc=f"reading {split}", unit=" files"):
            parts = Path(member.name).parts
            if member.isfile() and parts[-3] == split:
                file = tar.extractfile(member)
                assert file is not None
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                labels.append(classes.index(parts[-2]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def to_reals(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def random_flip(images: Tensor) -> Tensor:
    flip = torch.rand(images.shape[0], 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def one_hot(labels: Tensor, num_classes: int, dropout_rate: float = 0.0) -> Tensor:
    """Class vectors (n, num_classes); a dropped one is all zeros, which is the unconditional class."""
    keep = torch.rand(labels.shape[0], 1, device=labels.device) >= dropout_rate
    return F.one_hot(labels, num_classes).float() * keep


def ema_gamma(sigma_rel: float) -> float:
    """The exponent of the power-function EMA of this relative width (Karras et al. 2024, arXiv:2312.02696, eq. 123)."""
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    return peak * min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def held_out_loss(denoiser: K.layers.Denoiser, sample_density, images: Tensor, cond: Tensor, autocast) -> float:
    """Mean loss over the test split with the same noise and the same stratified noise levels for every model."""
    devices = [images.device] if images.is_cuda else []
    losses = []
    with torch.random.fork_rng(devices), autocast():
        torch.manual_seed(0)
        for reals, c in zip(to_reals(images).split(1000), cond.split(1000), strict=True):
            with K.utils.enable_stratified():
                sigma = sample_density([reals.shape[0]], device=reals.device)
            losses.append(denoiser.loss(reals, torch.randn_like(reals), sigma, mapping_cond=c).float().mean())
    return torch.stack(losses).mean().item()


@click.command(help=__doc__)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="A tar of train/<class>/*.jpg and test/<class>/*.jpg, or the folder of torchvision's CIFAR-10.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    show_default=True,
    default=zoo.CIFAR10.with_suffix(".json"),
    help="A k-diffusion config.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/cifar10"), show_default=True)
@click.option("--steps", default=24_000, show_default=True)
@click.option("--batch-size", default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=2_000, show_default=True, help="Steps between checkpoints.")
@click.option("--pause-after", type=float, default=math.inf, help="Write a checkpoint and stop after so many seconds.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(data, config, out, steps, batch_size, seed, save_every, pause_after, compiled):
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    out.mkdir(parents=True, exist_ok=True)
    source = json.loads(config.read_text())
    config = K.config.load_config(source)
    num_classes, dropout_rate = config["dataset"]["num_classes"], config["dataset"]["cond_dropout_rate"]

    train_images, train_labels = (t.to(device) for t in load_split(data, "train", config["dataset"]["classes"]))
    test_images, test_labels = (t.to(device) for t in load_split(data, "test", config["dataset"]["classes"]))

    torch.manual_seed(seed)
    model = K.config.make_model(config).to(device, memory_format=torch.channels_last)
    denoiser = K.config.make_denoiser_wrapper(config)(model)
    sample_density = K.config.make_sample_density(config["model"])
    gammas = {str(s): ema_gamma(s) for s in config["ema_sched"]["sigma_rel"]}
    emas = nn.ModuleDict({name.replace(".", "_"): copy.deepcopy(model).requires_grad_(False) for name in gammas})
    opt = config["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=opt["lr"],
        betas=opt["betas"],
        eps=opt["eps"],
        weight_decay=opt["weight_decay"],
        fused=device.type == "cuda",
    )
    step, seconds = 0, 0.0

    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        emas.load_state_dict(state["emas"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        torch.manual_seed(seed + step)
        tqdm.write(f"going on from step {step}")

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def save_checkpoint():
        state = {
            "model": model.state_dict(),
            "emas": emas.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds + time.monotonic() - started,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    loss_fn = torch.compile(denoiser.loss) if compiled else denoiser.loss
    test_cond = one_hot(test_labels, num_classes)
    running = torch.tensor(math.nan, device=device)
    progress = tqdm(total=steps, initial=step, desc="training", mininterval=2)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, opt["lr"], config["lr_sched"]["warmup_steps"])
        pick = torch.randint(train_images.shape[0], [batch_size], device=device)
        reals = random_flip(to_reals(train_images[pick])).contiguous(memory_format=torch.channels_last)
        cond = one_hot(train_labels[pick], num_classes, dropout_rate)
        with K.utils.enable_stratified():
            sigma = sample_density([batch_size], device=device)
        with autocast():
            loss = loss_fn(reals, torch.randn_like(reals), sigma, mapping_cond=cond).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        for gamma, ema in zip(gammas.values(), emas.values(), strict=True):
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - (1 - 1 / step) ** (gamma + 1))
        running = torch.where(running.isnan(), loss.detach(), running.lerp(loss.detach(), 0.01))
        if step % 100 == 0:
            progress.set_postfix(loss=f"{running.item():.4f}", refresh=False)
        pause = time.monotonic() - started > pause_after
        if step < steps and (pause or step % save_every == 0):
            save_checkpoint()
            now = held_out_loss(denoiser, sample_density, test_images, test_cond, autocast)
            tqdm.write(f"step {step}: training loss {running.item():.4f}, held-out loss {now:.4f}")
            if pause:
                tqdm.write(f"paused at step {step} of {steps}; the same command goes on")
                return

    seconds += time.monotonic() - started
    held_out = {}
    for name, ema in zip(gammas, emas.values(), strict=True):
        averaged = K.config.make_denoiser_wrapper(config)(ema)
        held_out[name] = held_out_loss(averaged, sample_density, test_images, test_cond, autocast)
        tqdm.write(f"EMA sigma_rel {name}: held-out loss {held_out[name]:.5f}")
    best = min(held_out, key=held_out.__getitem__)
    record = {
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "seconds": round(seconds),
        "ema_sigma_rel": float(best),
        "training_loss": round(running.item(), 5),
        "held_out_loss": {k: round(v, 5) for k, v in held_out.items()},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    path = out / "cifar10.safetensors"
    zoo.save(emas[best.replace(".", "_")].state_dict(), path, source, record)
    tqdm.write(f"{path} ({path.stat().st_size / 2**20:.1f} MiB): {json.dumps(record)}")


if __name__ == "__main__":
    main()
