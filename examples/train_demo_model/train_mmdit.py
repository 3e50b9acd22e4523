"""Train a demo model of the Stable Diffusion 3 kind: an MMDiT and two text encoders together, by flow matching.

The first part of the training sees the things alone, in the middle of 64 pixels (256 image tokens), the rest whole
scenes of 128 pixels (1,024 tokens). The learning rate is held, then decays to zero; how far the training is counts in
steps or, on a machine lent for minutes, in seconds. Resumes from its checkpoint. Saves a StableDiffusion3Pipeline in
half precision at 40 %, 70 % and the end, with a preview and the losses.

    python examples/train_demo_model/train_mmdit.py --emoji E --out runs/mmdit --seconds 300
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from muon import Muon
from scenes import CANVAS, Scenes
from training import (
    PREVIEW,
    Data,
    preview,
    save,
    spread_words,
    text_encoder_config,
    update_average,
    write_checkpoint,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"
SIZE: dict[str, Any] = {"num_layers": 6, "num_attention_heads": 3, "dual_attention_layers": (0, 1)}
HEAD = 64  # channels of a head
ENCODERS = {"text_encoder": (128, 3), "text_encoder_2": (64, 2)}  # width, layers
SHIFT = 2.0  # of the noise levels, in training and in sampling: the caption decides in the noisy ones
T5_TOKENS = 256  # zeros that StableDiffusion3Pipeline appends by default where there is no third text encoder
MUON = 4  # its learning rate in units of AdamW's
MARKS = (0.4, 0.7, 1.0)  # shares of the training after which the model is saved


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder img/google/64 of emoji-datasource-google")
    parser.add_argument("--demo", type=Path, default=DEMO_MODEL, help="pipeline whose autoencoder and words to take")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a saved pipeline to start from")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--seconds", type=float, help="of the clock, loading included, all runs together")
    parser.add_argument("--first", type=float, default=0.3, help="share of the training that sees 64 pixels")
    parser.add_argument("--batch", type=int, default=128, help="scenes of a step; of 64 pixels four times as many")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's; the matrices inside take four times it")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the training that decays the rate")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    compiled = "compile the blocks, at once or as soon as FILE exists"
    parser.add_argument("--compile", type=Path, nargs="?", const=Path(), metavar="FILE", help=compiled)
    parser.add_argument("--draw-steps", type=int, default=20, help="denoising steps of the previews")
    parser.add_argument("--minutes", type=float, default=10.0, help="between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_models(tokenizer: CLIPTokenizer, **size: Any) -> torch.nn.ModuleDict:
    """The transformer, gates and output zero at first (adaLN-zero: Peebles and Xie 2022), and its text encoders."""
    configs = {name: text_encoder_config(tokenizer, *sizes) for name, sizes in ENCODERS.items()}
    size = {**SIZE, **size}
    width = sum(config.hidden_size for config in configs.values())
    transformer = SD3Transformer2DModel(
        sample_size=CANVAS // 4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        attention_head_dim=HEAD,
        caption_projection_dim=size["num_attention_heads"] * HEAD,
        pos_embed_max_size=CANVAS // 4,
        qk_norm="rms_norm",
        **size,
    )
    for name, parameter in transformer.named_parameters():
        if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    encoders = {name: spread_words(CLIPTextModelWithProjection(config)) for name, config in configs.items()}
    return torch.nn.ModuleDict({"transformer": transformer, **encoders})


def encode(nets: torch.nn.ModuleDict, ids: torch.Tensor, t5_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `StableDiffusion3Pipeline` makes of a prompt without a third encoder: (B, N, C) and the pooled (B, C)."""
    outputs = [nets[name](ids, output_hidden_states=True) for name in ENCODERS]
    text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    return F.pad(text, (0, 0, 0, t5_tokens)), torch.cat([output.text_embeds for output in outputs], -1)


def flow_loss(nets: torch.nn.ModuleDict, latents: torch.Tensor, ids: torch.Tensor, generator, t5_tokens: int = 0):
    """Rectified flow: velocity from data to noise, logit-normal times (Esser et al. 2024, arXiv 2403.03206)."""
    where = {"generator": generator, "device": latents.device}
    times = torch.sigmoid(math.log(SHIFT) + torch.randn(len(latents), **where))
    noise = torch.randn(latents.shape, **where)
    noisy = torch.lerp(latents, noise, times[:, None, None, None])
    velocity = nets["transformer"](noisy, *encode(nets, ids, t5_tokens), 1000 * times).sample
    return F.mse_loss(velocity.float(), noise - latents)


class Trainer:
    """The networks with their optimisers and averages. A step's randomness depends on seed and number alone."""

    def __init__(self, nets: torch.nn.ModuleDict, lr: float, *, seed: int = 0, bf16: bool = False):
        self.nets, self.lr, self.seed, self.bf16 = nets, lr, seed, bf16
        self.average = copy.deepcopy(nets).requires_grad_(False)
        self.device = next(nets.parameters()).device
        named = list(nets.named_parameters())
        layers = re.compile(r"\.(transformer_blocks|layers)\.\d+\.(?!norm).*weight")
        matrices = [p for name, p in named if layers.search(name) and p.ndim == 2]
        others = [p for name, p in named if not (layers.search(name) and p.ndim == 2)]
        fused = self.device.type == "cuda"
        self.optimizers = {
            "muon": Muon(matrices, MUON * lr),
            "adamw": torch.optim.AdamW(others, lr, betas=(0.9, 0.99), fused=fused),
        }
        self.number = 0

    def step(self, data: Data, batch: int, rate: float) -> torch.Tensor:
        """One step at ``rate`` of the learning rate; whole scenes see the pipeline's zeros in one step of eight."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.number)
        whole = data.latents.shape[-1] == CANVAS // 4
        t5_tokens = T5_TOKENS if whole and self.number % 8 == 0 else 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = flow_loss(self.nets, *data.batch(batch, generator), generator, t5_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate * (MUON if name == "muon" else 1)
            optimizer.step()
            optimizer.zero_grad()
        update_average(self.average, self.nets, self.number)
        self.number += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        parts = {"nets": self.nets, "average": self.average, **self.optimizers}
        return {"number": self.number, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]
        for name, part in {"nets": self.nets, "average": self.average, **self.optimizers}.items():
            part.load_state_dict(state[name])


def pipeline(nets: torch.nn.ModuleDict, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """A pipeline of half-precision copies."""
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=copy.deepcopy(vae),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **copy.deepcopy(dict(nets.items())),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float16)


def main() -> None:
    began = time.time()
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    scenes = Scenes(args.emoji)
    vae = AutoencoderKL.from_pretrained(args.demo, subfolder="vae").to(args.device).eval()
    vae.register_to_config(shift_factor=0.0)  # StableDiffusion3Pipeline adds it
    tokenizer = CLIPTokenizer.from_pretrained(args.demo, subfolder="tokenizer")
    nets = new_models(tokenizer)
    for name in nets if args.init else ():
        nets[name].load_state_dict(type(nets[name]).from_pretrained(args.init, subfolder=name).state_dict())
    trainer = Trainer(nets.to(args.device), args.lr, seed=args.seed, bf16=args.bf16)
    print("parameters", {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}, flush=True)
    checkpoint, losses = args.out / "checkpoint.pt", []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        trainer.load_state_dict(state["trainer"])
        losses, began = state["losses"], began - state["seconds"]
    load = lambda canvas: Data.load(scenes, vae, tokenizer, canvas, args.out / f"latents{canvas}.pt")
    data = {canvas: load(canvas) for canvas in (CANVAS // 2, CANVAS)}

    seconds = lambda: time.time() - began
    share = lambda: seconds() / args.seconds if args.seconds else trainer.number / args.steps

    def deliver(percent: int) -> None:
        (args.out / "loss.json").write_text(json.dumps(losses))
        pipe = pipeline(trainer.average, vae, tokenizer)
        save(pipe, args.out / "pipeline")
        if args.device == "cpu":
            pipe.to(torch.float32)
        call = {"num_inference_steps": args.draw_steps, "guidance_scale": 4.0, "max_sequence_length": 0}
        preview(pipe, PREVIEW, **call).save(args.out / f"preview_{percent}.png")
        print(f"saved at {percent} %, {seconds():.0f} s", flush=True)

    done = share()
    marks = [mark for mark in MARKS if mark > done]
    saved, recent = time.time(), []
    while done < 1:
        if args.compile and args.compile.exists():
            for block in nets["transformer"].transformer_blocks:
                block.compile(dynamic=True)
            print(f"compiled from step {trainer.number}, {seconds():.0f} s", flush=True)
            args.compile = None
        small = done < args.first
        batch = 4 * args.batch if small else args.batch
        rate = min((trainer.number + 1) / 200, 1.0, (1 - done) / args.decay)
        recent.append(trainer.step(data[CANVAS // 2 if small else CANVAS], batch, rate))
        done = share()
        if len(recent) == 50 or done >= 1:
            losses.append([trainer.number, round(seconds(), 1), round(torch.stack(recent).mean().item(), 5)])
            recent.clear()
            print("step {} seconds {} loss {}".format(*losses[-1]), flush=True)
        if passed := [mark for mark in marks if mark <= done]:
            marks = marks[len(passed) :]
            deliver(round(100 * passed[-1]))
        if time.time() - saved > 60 * args.minutes or done >= 1:
            state = {"trainer": trainer.state_dict(), "losses": losses, "seconds": seconds()}
            write_checkpoint(state, checkpoint)
            saved = time.time()


if __name__ == "__main__":
    main()
