"""Train the demo model's autoencoder: 128x128 pixels to 32x32x4 latents.

Most steps see 64x64 crops, which cost a quarter and are enough for a convolutional network without attention; the
last ones see whole images, so that the statistics of the group norms fit them. Resumes from its checkpoint.

    python examples/train_demo_model/train_vae.py --emoji emoji/img/google/64 --out runs/vae
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from scenes import CANVAS, Scenes, to_tensor
from tqdm import trange


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder img/google/64 of emoji-datasource-google")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--whole", type=float, default=0.1, help="share of the steps, at the end, on whole images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=CANVAS,
        mid_block_add_attention=False,
    )


def gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on their gradients (edges) and on 8x8 means (colours, which pixels alone learn slowly)."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(target), strict=True))
    return F.l1_loss(output, target) + 0.5 * edges + F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(target, 8))


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(args.emoji)
    torch.manual_seed(args.seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.05)
    checkpoint, start = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    losses: list[float] = []
    began = time.time()
    for step in trange(start, args.steps, initial=start, total=args.steps, mininterval=30):
        rng = random.Random(args.seed * 1_000_003 + step)
        whole = step >= args.steps * (1 - args.whole)
        batch = args.batch // 2 if whole else args.batch
        images = to_tensor([scenes.render(scenes.draw(rng)) for _ in range(batch)])
        if not whole:
            half = CANVAS // 2
            corners = [(rng.randrange(half + 1), rng.randrange(half + 1)) for _ in range(batch)]
            images = torch.stack([x[:, i : i + half, j : j + half] for x, (i, j) in zip(images, corners, strict=True)])
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = reconstruction_loss(output, images) + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            save(args, vae, optimizer, schedule, step + 1, checkpoint)
            psnr, picture = judge(vae, scenes)
            picture.save(args.out / "reconstructions.png")
            rate = (step + 1 - start) / (time.time() - began)
            print(
                f"step {step + 1} loss {sum(losses[-250:]) / len(losses[-250:]):.4f} psnr {psnr:.2f} dB {rate:.2f}/s",
                flush=True,
            )
    finish(vae, scenes, args.out)


def save(args, vae, optimizer, schedule, step, path: Path) -> None:
    state = {
        "vae": vae.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@torch.no_grad()
def judge(vae: AutoencoderKL, scenes: Scenes) -> tuple[float, Image.Image]:
    """PSNR on 16 fixed whole images, and a picture of them: originals above, reconstructions below."""
    rng = random.Random(1)
    images = to_tensor([scenes.render(scenes.draw(rng)) for _ in range(16)])
    output = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * ((output - images) / 2).square().flatten(1).mean(1).log10().mean().item()
    rows = torch.cat([torch.cat(list(batch), -1) for batch in (images[:8], output[:8], images[8:], output[8:])], -2)
    return psnr, Image.fromarray(((rows.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


@torch.no_grad()
def finish(vae: AutoencoderKL, scenes: Scenes, out: Path) -> None:
    """Measure the latents' scale, as Stable Diffusion does, and save in diffusers format."""
    rng = random.Random(2)
    images = to_tensor([scenes.render(scenes.draw(rng)) for _ in range(256)])
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(32)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(out / "vae")
    print("scaling_factor", vae.config.scaling_factor, "channel means", latents.mean((0, 2, 3)).tolist(), flush=True)


if __name__ == "__main__":
    main()
