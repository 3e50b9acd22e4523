"""Bipartite soft matching against plain loops."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agentsd.matching import bipartite_soft_matching, partition

sides, strides = st.integers(1, 12), st.integers(1, 5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=80, deadline=None)
@given(height=sides, width=sides, sy=strides, sx=strides, seed=st.none() | st.integers(0, 9))
def test_partition_has_one_dst_in_every_whole_cell(height, width, sy, sx, seed):
    made = partition(height, width, sy, sx, None if seed is None else generator(seed))
    tokens = height * width
    assert sorted(made.order.tolist()) == list(range(tokens))
    assert torch.equal(made.order[made.inverse], torch.arange(tokens))
    assert made.num_dst == (height // sy) * (width // sx)
    dst = made.order[: made.num_dst].tolist()
    cells = [(p // width // sy, p % width // sx) for p in dst]
    assert sorted(cells) == [(y, x) for y in range(height // sy) for x in range(width // sx)]
    if seed is None:
        assert all(p // width % sy == 0 and p % width % sx == 0 for p in dst)


def test_random_partition_is_the_documented_draw():
    height, width, sy, sx = 13, 10, 4, 3
    made = partition(height, width, sy, sx, generator(7))
    draw = torch.randint(sy * sx, size=(height // sy, width // sx, 1), generator=generator(7))
    expected = {
        (y * sy + int(draw[y, x]) // sx) * width + x * sx + int(draw[y, x]) % sx
        for y in range(height // sy)
        for x in range(width // sx)
    }
    assert set(made.order[: made.num_dst].tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), height=sides, width=sides, sy=strides, sx=strides)
def test_cut_merges_the_best_edges(data, batch, height, width, sy, sx):
    made = partition(height, width, sy, sx, generator())
    num_src = height * width - made.num_dst
    if made.num_dst == 0:
        return
    r = data.draw(st.integers(0, num_src))
    x = torch.randn(batch, height * width, 6, generator=generator(1), dtype=torch.float64)
    matching = bipartite_soft_matching(x, made).cut(r)
    groups = height * width - r
    assert matching.groups == groups
    assert matching.group.shape == (batch, height * width)

    dst, src = made.order[: made.num_dst].tolist(), made.order[made.num_dst :].tolist()
    for b, group in enumerate(matching.group - torch.arange(batch)[:, None] * groups):
        assert set(group.tolist()) == set(range(groups))  # no group is empty
        assert len({int(group[d]) for d in dst}) == len(dst)  # no two dst are merged
        edges = {s: max((F.cosine_similarity(x[b, s], x[b, d], 0).item(), d) for d in dst) for s in src}
        best = sorted(src, key=lambda s: -edges[s][0])
        for s in best[:r]:
            assert group[s] == group[edges[s][1]]
        assert len({int(group[s]) for s in best[r:]} | {int(group[d]) for d in dst}) == groups  # the rest stay alone


def test_cuts_of_the_same_edges_are_nested():
    made = partition(8, 8, 4, 4, generator())
    edges = bipartite_soft_matching(torch.randn(2, 64, 8, generator=generator()), made)
    fine, coarse = edges.cut(20).group, edges.cut(50).group
    for group in range(2 * 44):
        assert coarse[fine == group].unique().numel() == 1


def test_samples_of_a_batch_are_matched_on_their_own():
    made = partition(8, 8, 2, 2, generator())
    x = torch.randn(3, 64, 8, generator=generator())
    together = bipartite_soft_matching(x, made).cut(30).group
    for b in range(3):
        alone = bipartite_soft_matching(x[b : b + 1], made).cut(30).group
        assert torch.equal(together[b] - b * 34, alone[0])


def test_similarities_are_never_more_than_the_hidden_layer_of_the_mlp():
    """And parts of them are as good as all of them: 48 x 16 for 64 tokens of 1, 2 or 64 numbers."""
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in tree_leaves(output) if isinstance(t, torch.Tensor))
            return output

    tokens = torch.randn(2, 64, 64, generator=generator())
    made = partition(8, 8, 2, 2)
    for channels in (1, 2, 64):
        x = tokens[..., :channels]
        sizes.clear()
        with Sizes():
            edges = bipartite_soft_matching(x, made)
        assert max(sizes) <= 8 * x.numel()
        dst, src = F.normalize(x, dim=-1)[:, made.order].split((16, 48), dim=1)
        chosen = (src * dst.gather(1, edges.nearest[..., None].expand(-1, -1, channels))).sum(-1)
        torch.testing.assert_close(chosen, (src @ dst.mT).amax(-1))
        assert torch.equal(edges.ranked.sort(-1).values, torch.arange(48).expand(2, -1))
