"""What holds in every cell of the compatibility table."""

from __future__ import annotations

import torch

import agentsd

FAR = 0.5  # root mean square of the change, as a share of the image's own deviation


def check(model, run, **settings) -> None:
    """The patch is active, the output finite and close to unpatched, and removal gives the bit-equal output back."""
    plain = run()
    assert torch.equal(run(), plain), "the unpatched run is not repeatable: this check would prove nothing"
    agentsd.apply_patch(model, seed=0, **settings)
    assert agentsd.report(model).patched
    patched = run()
    assert patched.isfinite().all()
    assert not torch.equal(patched, plain), "the patch did nothing"
    assert distance(patched, plain) < FAR
    assert torch.equal(run(), patched), "something leaks from one image to the next"
    agentsd.remove_patch(model)
    assert torch.equal(run(), plain)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).square().mean().sqrt() / b.std()).item()
