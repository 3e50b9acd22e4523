"""Train the demo model's UNet and text encoder together, on cached latents, and save a StableDiffusionPipeline.

Two stages buy views per minute: first the things alone, in the middle of 64 pixels (16x16 latents), which costs a
quarter; then whole scenes of 128 pixels, where the things have the same size and only their places are new.
Each stage holds its learning rate, then decays it to zero over the last part. Resumes from its checkpoint.

    python examples/train_demo_model/train_unet.py --emoji E --vae runs/vae/vae --out runs/unet16 --canvas 64
    python examples/train_demo_model/train_unet.py --emoji E --vae runs/vae/vae --out runs/unet32 \
        --init runs/unet16/pipeline
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from scenes import BACKGROUNDS, CANVAS, PLACES, SIZES, Scene, Scenes, to_tensor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLER = {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon", **BETAS}
PREVIEW = [
    "red apple on a blue background",
    "small rocket on a yellow background, left",
    "cat on a pink background",
    "pizza on a white background, right, mirrored",
    "small frog on a purple background, top",
    "house on an orange background",
    "hamburger on a gray background, bottom",
    "blue heart on a yellow background",
    "penguin on a white background",
    "small rainbow on a green background, right",
    "robot on a blue background",
    "strawberry on a pink background, top",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder img/google/64 of emoji-datasource-google")
    parser.add_argument("--vae", type=Path, required=True, help="folder that train_vae.py saved")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="a saved pipeline to start from, such as an earlier stage's")
    parser.add_argument("--canvas", type=int, default=CANVAS, choices=(CANVAS // 2, CANVAS))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps, at the end, that decay the rate")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, faster where the CPU computes in it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_tokenizer(words: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges spell each of ``words`` as one token; other words fall back to letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list("abcdefghijklmnopqrstuvwxyz,")
    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe.train_from_iterator(
        words * 2,
        trainers.BpeTrainer(
            vocab_size=4096,
            min_frequency=2,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            special_tokens=specials,
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = CLIPTokenizer(vocab, merges, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    assert not split, f"words of more than one token: {split}"
    return tokenizer


def new_models(tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # transformers' CLIP initialisation assumes pretraining at scale: its word vectors are too small to learn from here
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.5)
    unet = UNet2DConditionModel(
        sample_size=CANVAS // 4,
        block_out_channels=(32, 96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 3, 6),
        cross_attention_dim=128,
        norm_num_groups=16,
    )
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


@dataclass
class Data:
    """Scaled latents of every trained scene, (S, 4, h, w), and the token ids of its two captions and of no caption."""

    latents: torch.Tensor
    captions: torch.Tensor
    names: torch.Tensor
    empty: torch.Tensor

    @classmethod
    @torch.no_grad()
    def load(cls, args: argparse.Namespace, scenes: Scenes, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Data:
        places = PLACES if args.canvas == CANVAS else ("",)
        every = [Scene(*x) for x in product(scenes.things, BACKGROUNDS, places, SIZES, (False, True))]
        trained = [scene for scene in every if not scene.held_out]
        cache = args.vae / f"latents{args.canvas}.pt"
        if not cache.exists():
            chunks = []
            for i in tqdm(range(0, len(trained), 64), "latents", mininterval=10):
                images = to_tensor([scenes.render(scene, args.canvas) for scene in trained[i : i + 64]])
                chunks.append(vae.encode(images).latent_dist.mode().mul(vae.config.scaling_factor).half())
            torch.save(torch.cat(chunks), cache)
        ids = lambda texts: tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        captions, names = ids([s.caption for s in trained]), ids([s.thing for s in trained])
        return cls(torch.load(cache), captions, names, ids([""]))

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A quarter mirrored; a tenth without a caption, for guidance, and a tenth with the thing's name alone."""
        mirrored = torch.rand(size, generator=generator) < 0.25
        picked = 2 * torch.randint(len(self.latents) // 2, (size,), generator=generator) + mirrored
        kind = torch.rand(size, 1, generator=generator)
        ids = torch.where(kind < 0.8, self.captions[picked], self.names[picked])
        return self.latents[picked].float(), torch.where(kind < 0.9, ids, self.empty)


def diffusion_loss(nets, scheduler, latents, ids, generator) -> torch.Tensor:
    """Epsilon prediction, weighted by min-SNR with gamma 5 (Hang et al. 2023, arXiv 2303.09556).

    The noise has a little offset per channel: the scaled-linear schedule leaves the mean colour readable at its last
    step, and the model would take a background from there instead of from the caption. Timesteps are drawn in
    proportion to themselves: where a thing is and what it is gets decided in the noisy ones.
    """
    batch = len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    noise = noise + 0.1 * torch.randn(batch, latents.shape[1], 1, 1, generator=generator)
    timesteps = (1000 * torch.rand(batch, generator=generator).sqrt()).long()
    text = nets["text_encoder"](ids).last_hidden_state
    noisy = scheduler.add_noise(latents, noise, timesteps)
    output = nets["unet"](noisy, timesteps, encoder_hidden_states=text).sample
    snr = compute_snr(scheduler, timesteps)
    return ((output - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()


def pipeline(nets, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae,
        nets["text_encoder"],
        tokenizer,
        nets["unet"],
        DDIMScheduler(**SAMPLER, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """As diffusers does it, and such that transformers 4 finds the words and the text encoder's weights, too."""
    pipe.save_pretrained(folder)
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    weights = folder / "text_encoder" / "model.safetensors"
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in load_file(weights).items()}
    save_file(prefixed, weights, metadata={"format": "pt"})


def preview(nets, vae, tokenizer, canvas: int):
    pipe = pipeline(nets, vae, tokenizer)
    generators = [torch.Generator().manual_seed(i) for i in range(len(PREVIEW))]
    size = {"height": canvas, "width": canvas}
    images = pipe(PREVIEW, num_inference_steps=20, guidance_scale=4.0, generator=generators, **size).images
    return make_image_grid(images, 2, len(PREVIEW) // 2)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    scenes = Scenes(args.emoji)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    tokenizer = new_tokenizer(scenes.words(), args.out / "tokenizer")
    nets = new_models(tokenizer)
    data = Data.load(args, scenes, vae, tokenizer)
    ema = EMAModel(nets.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    held = args.steps * (1 - args.decay)
    rate = lambda step: min((step + 1) / 200, 1.0, max(args.steps - step, 0) / (args.steps - held))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    scheduler = DDPMScheduler(**BETAS)

    checkpoint, start = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        nets.load_state_dict(state["nets"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
    elif args.init:
        for name, net in nets.items():
            net.load_state_dict(type(net).from_pretrained(args.init / name).state_dict())
        ema = EMAModel(nets.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    print(len(data.latents), "scenes, parameters", parameters, flush=True)

    losses: list[float] = []
    began = time.time()
    for step in trange(start, args.steps, initial=start, total=args.steps, mininterval=60):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = diffusion_loss(nets, scheduler, *data.batch(args.batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(nets.parameters())
        losses.append(loss.item())
        done = step + 1
        if done % 250 == 0 or done == args.steps:
            state = {"nets": nets.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "schedule": schedule.state_dict(), "step": done}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            per_second = (done - start) / (time.time() - began)
            print(f"step {done} loss {sum(losses[-250:]) / len(losses[-250:]):.4f} {per_second:.2f}/s", flush=True)
        if done % 1000 == 0 or done == args.steps:
            ema.store(nets.parameters())
            ema.copy_to(nets.parameters())
            save(pipeline(nets, vae, tokenizer), args.out / "pipeline")
            preview(nets, vae, tokenizer, args.canvas).save(args.out / f"preview{done:06d}.png")
            ema.restore(nets.parameters())


if __name__ == "__main__":
    main()
