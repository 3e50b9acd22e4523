"""Tokens that keep the matching of the steps before."""

import pytest
import torch
from conftest import make_pipeline, unet_inputs

import agentsd
from agentsd import block

STEPS = 6
BLOCKS = 3  # of the highest resolution


@pytest.fixture
def matchings(monkeypatch) -> list[int]:
    """How many tokens were matched, each time that they were."""
    made, original = [], block.bipartite_soft_matching

    def counted(x, partition):
        made.append(x.shape[1])
        return original(x, partition)

    monkeypatch.setattr(block, "bipartite_soft_matching", counted)
    return made


def trajectory(pipe, still: bool = False) -> list[torch.Tensor]:
    """Outputs of the UNet at each timestep, for the same inputs; ``still`` if it does not see which step it is."""
    hook = pipe.unet.time_embedding.register_forward_hook(lambda *args: torch.zeros_like(args[-1]) if still else None)
    pipe.scheduler.set_timesteps(STEPS)
    found = [pipe.unet(**unet_inputs() | {"timestep": t}).sample for t in pipe.scheduler.timesteps]
    hook.remove()
    return found


@pytest.mark.parametrize(("interval", "share", "times"), [(1, 0, 6), (2, 0, 3), (4, 0, 2), (9, 0, 1), (4, 0.5, 3)])
def test_tokens_are_matched_in_every_so_many_steps_and_where_the_phase_changes(matchings, interval, share, times):
    pipe = agentsd.apply_patch(make_pipeline(), seed=0, agent_steps=share, match_interval=interval)
    trajectory(pipe)
    assert len(matchings) == times * BLOCKS
    trajectory(pipe)  # another image begins anew
    assert len(matchings) == 2 * times * BLOCKS


def test_what_is_kept_is_right_where_tokens_stay_as_they_were(matchings):
    settings = {"min_tokens": 0, "use_rand": False, "agent_steps": 0.5}
    fresh = trajectory(agentsd.apply_patch(make_pipeline(), **settings), still=True)
    made = len(matchings)
    kept = trajectory(agentsd.apply_patch(make_pipeline(), **settings, match_interval=3), still=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))
    assert len(matchings) == made + made // 3


def test_calls_of_one_step_keep_a_matching_each(matchings):
    """Guidance in two calls: each goes on with its own, and gives what it gives alone."""
    pipe = make_pipeline()
    given = {name: x for name, x in unet_inputs().items() if name != "timestep"}

    def draw(*prompts):
        agentsd.apply_patch(pipe, seed=0, match_interval=3)
        pipe.scheduler.set_timesteps(STEPS)
        inputs = [{name: x.flip(0) * (1 + prompt) for name, x in given.items()} for prompt in prompts]
        steps = [[pipe.unet(**x | {"timestep": t}).sample for x in inputs] for t in pipe.scheduler.timesteps]
        return [torch.stack(outputs) for outputs in zip(*steps, strict=True)]

    both, first, second = draw(0, 1), draw(0), draw(1)
    assert torch.equal(both[0], first[0]) and torch.equal(both[1], second[0])


def test_under_gradients_every_call_is_matched(matchings):
    pipe = agentsd.apply_patch(make_pipeline(), seed=0, match_interval=3)
    pipe.scheduler.set_timesteps(STEPS)
    with torch.enable_grad():
        for t in pipe.scheduler.timesteps:
            pipe.unet(**unet_inputs() | {"timestep": t})
    assert len(matchings) == STEPS * BLOCKS


def test_recorded_calls_are_matched_each_time_and_so_refuse_it():
    with pytest.raises(ValueError, match="match_interval=2 is not allowed: expected 1, since recorded calls"):
        agentsd.apply_patch(make_pipeline(), match_interval=2, cuda_graphs=True)


@pytest.mark.parametrize("nothing", [{"ratio": 0, "cache_interval": 2}, {"preset": "quality"}])
def test_where_nothing_merges_it_is_named(nothing):
    with pytest.warns(UserWarning, match="match_interval"):
        agentsd.apply_patch(make_pipeline(), match_interval=2, **nothing)
