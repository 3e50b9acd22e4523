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
import copy
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from scenes import CANVAS, Scenes
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import trange
from training import (
    MAX_TOKENS,
    PREVIEW,
    Data,
    preview,
    save,
    spread_words,
    text_encoder_config,
    update_average,
    write_checkpoint,
)
from transformers import CLIPTextModel, CLIPTokenizer

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLER = {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon", **BETAS}


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
    text_encoder = spread_words(CLIPTextModel(text_encoder_config(tokenizer, width=128, layers=3)))
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


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    scenes = Scenes(args.emoji)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    tokenizer = new_tokenizer(scenes.words(), args.out / "tokenizer")
    nets = new_models(tokenizer)
    data = Data.load(scenes, vae, tokenizer, args.canvas, args.vae / f"latents{args.canvas}.pt")
    if args.init:
        for name, net in nets.items():
            net.load_state_dict(type(net).from_pretrained(args.init / name).state_dict())
    average = copy.deepcopy(nets).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2)
    held = args.steps * (1 - args.decay)
    rate = lambda step: min((step + 1) / 200, 1.0, max(args.steps - step, 0) / (args.steps - held))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    scheduler = DDPMScheduler(**BETAS)

    checkpoint, start = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        nets.load_state_dict(state["nets"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
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
        update_average(average, nets, step)
        losses.append(loss.item())
        done = step + 1
        if done % 250 == 0 or done == args.steps:
            parts = {"nets": nets, "average": average, "optimizer": optimizer, "schedule": schedule}
            write_checkpoint({"step": done, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)
            per_second = (done - start) / (time.time() - began)
            print(f"step {done} loss {sum(losses[-250:]) / len(losses[-250:]):.4f} {per_second:.2f}/s", flush=True)
        if done % 1000 == 0 or done == args.steps:
            pipe = pipeline(average, vae, tokenizer)
            save(pipe, args.out / "pipeline")
            call = {"num_inference_steps": 20, "guidance_scale": 4.0, "height": args.canvas, "width": args.canvas}
            preview(pipe, PREVIEW[:12], **call).save(args.out / f"preview{done:06d}.png")


if __name__ == "__main__":
    main()
