"""Merging and unmerging against plain loops."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentsd import matching as matchings
from agentsd.matching import Matching, bipartite_soft_matching, partition
from agentsd.merge import merge, sizes, unmerge


def random_matching(batch: int, height: int, width: int, r: int, seed: int = 0) -> tuple[torch.Tensor, Matching]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, height * width, 6, generator=generator)
    return x, bipartite_soft_matching(x, partition(height, width, 2, 2, generator)).cut(r)


@pytest.fixture(params=["in order", "in any order"])
def adds(request, monkeypatch) -> bool:
    """As on a CPU, and as on CUDA, where groups are bags that one thread each adds up."""
    if request.param == "in any order":
        monkeypatch.setattr(matchings, "ADDS_IN_ORDER", ())
    return request.param == "in order"


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 4),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    share=st.floats(0, 0.75),
    data=st.data(),
)
def test_means_equal_a_plain_loop(adds, batch, height, width, share, data):
    x, matching = random_matching(batch, height, width, int(height * width * share), data.draw(st.integers(0, 99)))
    (batch, tokens), groups = matching.group.shape, matching.groups
    assert (matching.bags is None) == adds
    merged = merge(x, matching)
    assert merged.shape == (batch, groups, 6)
    assert torch.equal(sizes(matching).flatten().long(), matching.group.flatten().bincount())
    rows = x.reshape(batch * tokens, 6)
    for group in range(batch * groups):
        members = [rows[i] for i in range(batch * tokens) if matching.group.flatten()[i] == group]
        torch.testing.assert_close(merged.view(-1, 6)[group], sum(members) / len(members))
        if len(members) == 1:
            assert torch.equal(merged.view(-1, 6)[group], members[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerged_tokens_survive_untouched(adds, dtype):
    x, matching = random_matching(2, 8, 8, 25)
    x = x.to(dtype)
    back = unmerge(merge(x, matching), matching)
    alone = matching.group.flatten().bincount()[matching.group] == 1
    assert alone.any() and not alone.all()
    assert torch.equal(back[alone], x[alone])


def test_merging_nothing_is_the_identity():
    x, matching = random_matching(2, 6, 6, 0)
    assert torch.equal(unmerge(merge(x, matching), matching), x)


def test_every_token_gets_its_groups_row():
    _, matching = random_matching(3, 8, 6, 30)
    y = torch.randn(3, 18, 4)
    back = unmerge(y, matching)
    assert torch.equal(back.reshape(-1, 4), y.reshape(-1, 4)[matching.group.flatten()])
    torch.testing.assert_close(merge(back, matching), y)  # merging what was unmerged gives it back


def test_gradients_are_those_of_a_mean(adds):
    x, matching = random_matching(1, 4, 4, 6)
    with torch.enable_grad():
        x.requires_grad_()
        merge(x, matching).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], 1 / matching.group[0].bincount()[matching.group[0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [300, 1000, 4096])
def test_large_groups_keep_their_mean(dtype, tokens):
    """More tokens than bfloat16 can count (256) or than float16 can sum."""
    x = (torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(0)) + 20).to(dtype)
    zero = torch.zeros(1, dtype=torch.long)
    bags = [None] if dtype == torch.float16 else [None, (torch.arange(tokens), zero)]  # a CPU's overflow in float16
    for bag in bags:
        merged = merge(x, Matching(zero.expand(1, tokens), 1, bag))
        exact, eps = x.double().mean(1, keepdim=True), torch.finfo(dtype).eps
        torch.testing.assert_close(merged.double(), exact, rtol=eps, atol=0)
