"""What timm asks of a registered model, for the smallest of each family."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from conftest import sweep
from golden import image
from timm.models._manipulate import group_parameters
from timm.models.vision_transformer import ParallelScalingBlock
from timm.optim import create_optimizer_v2

from agentsd.vision import AgentAttention  # which registers the models

FAMILIES = {
    "deit": ("agent_deit_tiny", {"embed_dim": 24, "depth": 3}),
    "pvt": ("agent_pvt_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 16, 20, 32), "agents": (9, 9, 4, 4)}),
    "pvt softmax": ("agent_pvt_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 20, 32), "attn_type": "AABB"}),
    "swin": ("agent_swin_tiny", {"embed_dim": 12, "depths": (1, 1, 2, 2), "agent_blocks": (1, 1, 1, 0)}),
    "cswin": ("agent_cswin_tiny", {"embed_dim": 8, "depths": (1, 1, 1, 1)}),
}
EVERY = [f"agent_{f}_{s}" for f in ("deit", "swin", "cswin") for s in ("tiny", "small", "base")] + [
    f"agent_pvt_{s}" for s in ("tiny", "small", "medium", "large")
]
PYRAMIDS = [family for family in FAMILIES if family != "deit"]


def small(family: str, **options: object) -> torch.nn.Module:
    name, sizes = FAMILIES[family]
    return timm.create_model(name, **{"img_size": 64, "num_classes": 5, **sizes, **options}).eval()


@pytest.mark.parametrize("name", EVERY)
def test_registered_with_a_pretrained_cfg(name: str) -> None:
    assert name in timm.list_models("agent_*")
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["fixed_input_size"]
    assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("family", FAMILIES)
class TestClassifier:
    def test_forward_is_features_then_head(self, family: str) -> None:
        model, x = small(family), image(64, 64)
        features = model.forward_features(x)
        logits = model(x)
        assert logits.shape == (2, 5)
        assert torch.equal(logits, model.forward_head(features))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        if family != "deit":
            assert features.shape == (2, 2, 2, model.num_features)
            assert model.output_fmt == "NHWC"

    @torch.enable_grad()
    def test_every_parameter_learns(self, family: str) -> None:
        model = small(family).train()
        model(image(64, 64)).square().mean().backward()
        # one row or column of the last map has no neighbour to be told from by its bias
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    def test_reset_classifier(self, family: str) -> None:
        model, x = small(family), image(64, 64)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.num_classes == 7
        model.reset_classifier(0)
        assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
        model.reset_classifier(0, "")
        assert model(x).shape == model.forward_features(x).shape

    def test_other_channels_and_rectangles(self, family: str) -> None:
        model = small(family, in_chans=2, img_size=(64, 96))
        assert model(torch.randn(1, 2, 64, 96)).shape == (1, 5)

    def test_wrong_size_is_an_error(self, family: str) -> None:
        with pytest.raises((ValueError, AssertionError), match="64"):
            small(family)(image(96, 96))

    @torch.enable_grad()
    def test_gradient_checkpointing_changes_nothing(self, family: str) -> None:
        model, x = small(family).train(), image(64, 64)
        gradients = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            model.zero_grad()
            model(x).square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        torch.testing.assert_close(*gradients)

    def test_drop_path_is_for_training_only(self, family: str) -> None:
        model, x = small(family, drop_path_rate=0.9), image(64, 64)
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))

    @pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate"])
    def test_dropout_is_in_every_block(self, family: str, rate: str) -> None:
        model = small(family, **{rate: 0.25})
        dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        if rate == "proj_drop_rate":  # behind the attention, and behind both maps of the MLP
            assert dropouts == [0.25] * 3 * sum(name.endswith("mlp") for name, _ in model.named_modules())
        assert torch.equal(model(image(64, 64)), model(image(64, 64)))
        model.train()
        assert not torch.equal(model(image(64, 64)), model(image(64, 64)))

    def test_unknown_options_are_errors(self, family: str) -> None:
        with pytest.raises(TypeError, match="proj_bais"):
            small(family, proj_bais=False)

    def test_parameter_groups(self, family: str) -> None:
        model = small(family)
        names = dict(model.named_parameters())
        groups = group_parameters(model, model.group_matcher(), reverse=True)
        assert set(groups) == set(names)
        assert groups["head.weight"] == max(groups.values())
        without = model.no_weight_decay()
        assert without <= set(names) and any("an_bias" in name for name in without)
        decays = {
            id(p)
            for g in create_optimizer_v2(model, weight_decay=0.1).param_groups
            if g["weight_decay"]
            for p in g["params"]
        }
        assert not decays & {id(names[name]) for name in without}
        create_optimizer_v2(model, layer_decay=0.7)

    def test_intermediates_are_the_features_on_the_way(self, family: str) -> None:
        model, x = small(family), image(64, 64)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        tokens = final[:, 1:].transpose(1, 2) if family == "deit" else final.permute(0, 3, 1, 2).flatten(2)
        torch.testing.assert_close(last.flatten(2), tokens)
        early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early, maps[:2])
        stopped, early = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        torch.testing.assert_close(early, maps[:2])
        if family != "deit":  # whose norm fits every block, as in timm
            torch.testing.assert_close(stopped.permute(0, 3, 1, 2), maps[1])

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_compiles_and_exports(self, family: str) -> None:
        model, x = small(family), image(64, 64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("family", sweep(["pvt"], [family for family in FAMILIES if family != "pvt"]))
def test_exports_to_onnx(family: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, file = small(family), image(64, 64), io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.long
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_for_sizes_that_vary() -> None:
    """But for the size that the model is built for, where nothing is stretched."""
    model = small("pvt", depths=(1, 1, 1, 1), dynamic_img_size=True)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for height, width in ((128, 96), (160, 192)):
        torch.testing.assert_close(compiled(image(height, width)), model(image(height, width)))


@pytest.mark.parametrize(
    "option",
    [
        {"qk_norm": True},
        {"scale_attn_norm": True},
        {"proj_bias": False},
        {"attn_layer": "diff"},
        {"block_fn": ParallelScalingBlock},
        {"patch_drop_rate": 0.5},
        {"dynamic_img_size": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_deit_refuses_what_agent_attention_has_no_place_for(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*leave it out"):
        small("deit", **option)


@pytest.mark.parametrize(
    "option",
    [
        {"global_pool": "map"},
        {"scale_mlp_norm": True},
        {"init_values": 0.1},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True},
        {"dtype": torch.float64},
    ],
    ids=str,
)
@torch.enable_grad()
def test_deit_takes_timms_other_options(option: dict[str, object]) -> None:
    """Each gives a model of other parameters, all of which learn."""
    model = small("deit", **option)
    model(image(64, 64).to(option.get("dtype"))).square().sum().backward()
    assert all(p.grad is not None and p.dtype == option.get("dtype", p.dtype) for p in model.parameters())
    usual = {name: (p.shape, p.dtype) for name, p in small("deit").named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} != usual


def test_deit_has_agents_in_as_many_blocks_as_are_given() -> None:
    kinds = lambda **options: [isinstance(block.attn, AgentAttention) for block in small("deit", **options).blocks]
    assert kinds(depth=14) == [True] * 14 and kinds(agents=(9, 4)) == [True, True, False]
    with pytest.raises(ValueError, match="4 numbers, for 3 blocks"):
        small("deit", agents=(9,) * 4)


def test_deit_gives_the_features_that_timms_does() -> None:
    """By default the last three of its maps."""
    model = small("deit", depth=4, features_only=True)
    twin = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=24, depth=4, features_only=True)
    assert model.feature_info.module_name() == twin.feature_info.module_name()
    assert [m.shape for m in model(image(64, 64))] == [m.shape for m in twin(image(64, 64))]


@pytest.mark.parametrize("family", ["pvt", "cswin"])
def test_an_attention_of_no_such_type_is_an_error(family: str) -> None:
    with pytest.raises(ValueError, match=r"attn_type='AAXB'.*'A' .*'B'"):
        small(family, attn_type="AAXB")


@pytest.mark.parametrize("family", ["deit", "pvt", "cswin"])  # windows cannot be cut from no image: timm's Swin, too
def test_a_batch_of_no_images(family: str) -> None:
    model, x = small(family), torch.empty(0, 3, 64, 64)
    assert model(x).shape == (0, 5)
    assert model.train()(x).shape == (0, 5)


@pytest.mark.parametrize("family", PYRAMIDS)
class TestFeatures:
    def test_maps_of_any_size(self, family: str) -> None:
        model = small(family, features_only=True)
        height, width = (64, 96) if family == "cswin" else (75, 93)
        maps = model(image(height, width))
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        for level, m in enumerate(maps):
            assert abs(m.shape[2] - height / 4 / 2**level) <= 1 and abs(m.shape[3] - width / 4 / 2**level) <= 1

    def test_some_of_the_maps(self, family: str) -> None:
        whole, some = small(family, features_only=True), small(family, features_only=True, out_indices=(0, 2))
        some.load_state_dict({k.removeprefix("model."): v for k, v in whole.state_dict().items()}, strict=False)
        maps = whole(image(64, 64))
        torch.testing.assert_close(some(image(64, 64)), [maps[0], maps[2]])
        assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in whole.parameters())

    def test_dynamic_classifier_agrees_at_its_own_size(self, family: str) -> None:
        fixed, free = small(family), small(family, dynamic_img_size=True)
        state = {k: v for k, v in fixed.state_dict().items() if not k.endswith("attn_mask")}
        free.load_state_dict(state)
        torch.testing.assert_close(free(image(64, 64)), fixed(image(64, 64)))
        assert free(image(128, 64)).shape == (2, 5)
