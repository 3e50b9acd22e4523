"""What holds in every cell of the compatibility table."""

from __future__ import annotations

import torch

import agentsd

FAR = 0.5  # root mean square of the change, as a share of the image's own deviation


def check(model, run, *settings: dict) -> None:
    """The patch is active, the output finite and close to unpatched, and removal gives the bit-equal output back.

    With each of ``settings`` in turn; with the default ones where none are given.
    """
    plain = run()
    assert torch.equal(run(), plain), "the unpatched run is not repeatable: this check would prove nothing"
    for given in settings or ({},):
        agentsd.apply_patch(model, seed=0, **given)
        report = agentsd.report(model)
        assert report.patched or report.settings.reuses
        patched = run()
        assert patched.isfinite().all()
        assert not torch.equal(patched, plain), f"the patch did nothing with {given}"
        assert distance(patched, plain) < FAR, given
        assert torch.equal(run(), patched), f"something leaks from one image to the next with {given}"
        agentsd.remove_patch(model)
        assert torch.equal(run(), plain), given


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).square().mean().sqrt() / b.std()).item()
