"""The trainer of the Stable Diffusion 3 demo model, on a tiny configuration."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from packaging.version import Version
from transformers import CLIPTokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = {"num_layers": 2, "num_attention_heads": 1, "dual_attention_layers": (0,)}


@pytest.fixture(autouse=True)
def no_grad():
    """Training needs the gradients that other tests do without."""


@pytest.fixture(scope="module")
def mmdit():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "train_demo_model")
        import train_mmdit  # noqa: PLC0415

        yield train_mmdit


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EXAMPLES / "demo_model", subfolder="tokenizer")


def new_trainer(mmdit, tokenizer):
    torch.manual_seed(0)
    return mmdit.Trainer(mmdit.new_models(tokenizer, **TINY), lr=2e-3)


def scenes(mmdit, tokenizer, side: int = 8):
    """Four captions, each with latents of one colour."""
    things = ["red apple", "cat", "rocket", "moon"]
    latents = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(1)).expand(4, 4, side, side)
    ids = tokenizer(things, padding="max_length", return_tensors="pt").input_ids
    return mmdit.Data(latents.half(), ids, ids, tokenizer([""], padding="max_length", return_tensors="pt").input_ids)


def test_training_lowers_the_loss(mmdit, tokenizer):
    trainer, data = new_trainer(mmdit, tokenizer), scenes(mmdit, tokenizer)
    losses = [trainer.step(data, batch=16, rate=1.0).item() for _ in range(40)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_training_resumes_exactly(mmdit, tokenizer, tmp_path):
    data = scenes(mmdit, tokenizer)
    straight = new_trainer(mmdit, tokenizer)
    rates = [0.5, 1.0, 1.0, 0.5]
    expected = [straight.step(data, 4, rate).item() for rate in rates]

    interrupted = new_trainer(mmdit, tokenizer)
    for rate in rates[:2]:
        interrupted.step(data, 4, rate)
    mmdit.write_checkpoint(interrupted.state_dict(), tmp_path / "checkpoint.pt")
    torch.manual_seed(1)
    resumed = mmdit.Trainer(mmdit.new_models(tokenizer, **TINY), lr=2e-3)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert [resumed.step(data, 4, rate).item() for rate in rates[2:]] == expected[2:]
    for nets in ("nets", "average"):
        wanted, got = getattr(straight, nets).state_dict(), getattr(resumed, nets).state_dict()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_the_encoders_give_what_the_pipeline_gives(mmdit, tokenizer, tmp_path):
    """Captions reach the transformer in training as they do in the saved pipeline, with and without its zeros."""
    vae = AutoencoderKL.from_pretrained(EXAMPLES / "demo_model", subfolder="vae")
    vae.register_to_config(shift_factor=0.0)
    nets = mmdit.new_models(tokenizer, **TINY)
    mmdit.save(mmdit.pipeline(nets, vae, tokenizer), tmp_path)
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = ["small cat on a blue background, left", ""]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    obeys = Version(diffusers.__version__) >= Version("0.36")  # before, as many zeros as CLIP's tokens, always
    for asked in (0, mmdit.T5_TOKENS):
        zeros = asked if obeys else tokenizer.model_max_length
        with torch.no_grad():
            text, pooled = mmdit.encode(nets, ids, zeros)
            given, _, given_pooled, _ = pipe.encode_prompt(
                captions, None, None, do_classifier_free_guidance=False, max_sequence_length=asked
            )
        assert text.shape == given.shape == (2, tokenizer.model_max_length + zeros, 192)
        torch.testing.assert_close(text, given, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(pooled, given_pooled, rtol=1e-2, atol=1e-2)
    image = pipe(prompt="cat on a blue background", num_inference_steps=1, max_sequence_length=0).images[0]
    assert image.size == (128, 128)


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 12, 5), (2, 5, 12)])
def test_muon_makes_updates_orthogonal(mmdit, shape):
    """Each singular value lies near one, whatever those of the gradient are, and the singular vectors stay."""
    from muon import orthogonalized  # noqa: PLC0415

    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    updates = orthogonalized(matrices)
    assert updates.shape == matrices.shape
    assert torch.linalg.svdvals(updates).sub(1).abs().max() < 0.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    aligned = u.mT @ updates @ v.mT
    assert (aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_muon_treats_matrices_of_one_shape_apart(mmdit):
    """A batch of matrices is updated as each would be alone."""
    values = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    grads = [torch.randn(4, 6, generator=torch.Generator().manual_seed(9 + i)) for i in range(3)]

    def stepped(indices: list[int]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(values[i].clone()) for i in indices]
        optimizer = mmdit.Muon(parameters, lr=0.1)
        for scale in (1.0, -2.0):
            for parameter, i in zip(parameters, indices, strict=True):
                parameter.grad = scale * grads[i]
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for alone, together in zip([stepped([i])[0] for i in range(3)], stepped([0, 1, 2]), strict=True):
        torch.testing.assert_close(alone, together)
