"""Recorded calls are replayed with what is read in them brought up to date; here without CUDA, by calling again."""

import copy

import pytest
import torch
from conftest import embeddings, image, make_pipeline, make_unet, unet_inputs

import agentsd
from agentsd import capture
from agentsd.patch import patch_of

SETTINGS = {
    "nothing": {"ratio": 0},
    "paper": {"ratio": 0.4},
    "balanced": {"preset": "balanced"},
}


class Recorder:
    """Runs a recorded call again on its buffers, as a graph does, without anything that the call leaves in Python."""

    def __init__(self, device):
        self.device = device

    def take_turn(self):
        pass

    def record(self, function):
        function()
        return function


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(capture, "CudaGraphs", Recorder)


def another_prompt(pipe) -> torch.Tensor:
    prompt = {name: -value for name, value in embeddings(pooled="XL" in type(pipe).__name__).items()}
    noise = torch.Generator().manual_seed(0)
    return pipe(**prompt, num_inference_steps=8, output_type="latent", generator=noise).images


def captured(model) -> int:
    return patch_of(model).capture.captured


@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_equal_and_nothing_is_recorded_after_the_first(recorded, kind, name):
    pipe = make_pipeline(kind)
    draw = lambda: [image(pipe, steps=8), image(pipe, steps=8, seed=1), another_prompt(pipe)]
    agentsd.apply_patch(pipe, **SETTINGS[name])
    plain = draw()
    agentsd.apply_patch(pipe, **SETTINGS[name], cuda_graphs=True)
    first = image(pipe, steps=8)
    count = captured(pipe)
    assert count == {"nothing": 1, "paper": 2, "balanced": 2}[name]
    for one, other in zip([first, *draw()], [plain[0], *plain], strict=True):
        assert torch.equal(one, other)
    assert captured(pipe) == count


def test_a_size_has_graphs_of_its_own_and_old_ones_are_dropped(recorded, monkeypatch):
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    unet = agentsd.apply_patch(make_unet(), 0, cuda_graphs=True)
    for size, count in ((16, 1), (24, 2), (16, 2), (32, 3), (16, 3), (24, 4)):
        unet(**unet_inputs(height=size, width=size))
        assert captured(unet) == count


def test_weights_in_place_are_read_and_others_recorded_anew(recorded):
    unet, plain, inputs = make_unet(), make_unet(), unet_inputs()
    agentsd.apply_patch(unet, 0, cuda_graphs=True)
    unet(**inputs)
    for net in (unet, plain):
        net.conv_out.weight.data *= 2
    assert torch.equal(unet(**inputs).sample, plain(**inputs).sample) and captured(unet) == 1
    for net in (unet, plain):
        net.conv_out.weight = torch.nn.Parameter(net.conv_out.weight * 2)
    assert torch.equal(unet(**inputs).sample, plain(**inputs).sample) and captured(unet) == 2


@pytest.mark.parametrize("where", ["mid_block.resnets.0.conv1", "conv_out"])
def test_weights_that_change_between_calls_of_an_image(recorded, where):
    """A cached call looks at the modules that it runs alone: those that it skips, the next full call sees."""
    graphed, plain = (agentsd.apply_patch(make_unet(), 0, cache_interval=3, cuda_graphs=on) for on in (True, False))
    timesteps, recorded_at = torch.arange(900, 0, -100), []
    for call, timestep in enumerate(timesteps):
        if call == 5:
            for unet in (graphed, plain):
                module = unet.get_submodule(where)
                module.weight = torch.nn.Parameter(module.weight * 2)
        before, inputs = captured(graphed), unet_inputs(timestep=timestep)
        assert torch.equal(graphed(**inputs).sample, plain(**inputs).sample)
        recorded_at += [call] * (captured(graphed) - before)
    assert recorded_at == ([0, 1, 6, 7] if where.startswith("mid_block") else [0, 1, 5, 6])


def test_undo_and_copies(recorded):
    unet, inputs = make_unet(), unet_inputs()
    before = sorted(vars(unet))
    agentsd.apply_patch(unet, 0, cuda_graphs=True)
    expected = unet(**inputs).sample
    copied = copy.deepcopy(unet)
    assert captured(copied) == 0
    assert torch.equal(copied(**inputs).sample, expected) and captured(copied) == captured(unet) == 1
    agentsd.remove_patch(unet)
    assert sorted(vars(unet)) == before
    assert torch.equal(unet(**inputs).sample, expected)


def test_what_cannot_be_recorded_runs_as_without_and_says_why(recorded, recwarn):
    unet, inputs = make_unet(), unet_inputs()
    expected = unet(**inputs).sample
    agentsd.apply_patch(unet, 0, cuda_graphs=True)
    odd = {**inputs, "cross_attention_kwargs": {"anything": object()}}
    with pytest.warns(UserWarning, match="a object is among the arguments"):
        assert torch.equal(unet(**odd).sample, expected)
    with torch.enable_grad(), pytest.warns(UserWarning, match="gradients are recorded"):
        unet(**inputs)
    assert captured(unet) == 0


def test_a_recording_that_fails_is_not_tried_again(recorded, monkeypatch):
    def fail(self, function):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(Recorder, "record", fail)
    unet, inputs = make_unet(), unet_inputs()
    expected = unet(**inputs).sample
    agentsd.apply_patch(unet, 0, cuda_graphs=True)
    with pytest.warns(UserWarning, match="recording a full call failed with .*not permitted") as caught:
        for _ in range(2):
            assert torch.equal(unet(**inputs).sample, expected)
    assert len(caught) == 1


def test_without_cuda_it_says_so():
    unet, inputs = make_unet(), unet_inputs()
    agentsd.apply_patch(unet, 0, cuda_graphs=True)
    with pytest.warns(UserWarning, match="latents are on cpu"):
        unet(**inputs)
