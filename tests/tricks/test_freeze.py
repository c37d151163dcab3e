"""What is frozen stays as it was, bit by bit, through every `model.train()`; the rest trains."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

from tricks.freeze import freeze_except, frozen_digest, unfreeze

BatchNorm = nn.modules.batchnorm._BatchNorm


def make_model(seed=0):
    """A stem, a body and a head, with a dropout before each layer of the last two."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential()
        model.add_module("stem", nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()))
        body = [nn.Dropout(), nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten()]
        model.add_module("body", nn.Sequential(*body))
        model.add_module("drop", nn.Dropout())
        model.add_module("head", nn.Linear(6 * 3 * 4, 7))
        return model


def on_meta(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, num_classes=3)


def small_vit():
    return torchvision.models.VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        dropout=0.5,
        attention_dropout=0.5,
        num_classes=3,
    )


def small_swin():
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 2],
        dropout=0.5,
        attention_dropout=0.5,
        stochastic_depth_prob=0.5,
        num_classes=3,
    )


def small_resnet():
    blocks = [1, 1, 1, 1]
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, blocks, num_classes=3)


def small_efficientnet():
    config = torchvision.models.efficientnet.MBConvConfig
    blocks = [config(1, 3, 1, 8, 8, 2, 1.0, 1.0), config(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    return torchvision.models.EfficientNet(blocks, 0.5, stochastic_depth_prob=0.5, num_classes=3)


def small_mobilenet():
    config = torchvision.models.mobilenetv3.InvertedResidualConfig
    blocks = [config(8, 3, 8, 8, True, "RE", 2, 1, 1), config(8, 3, 16, 12, False, "HS", 1, 1, 1)]
    return torchvision.models.MobileNetV3(blocks, last_channel=24, num_classes=3, dropout=0.5)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def training(model):
    return {name for name, module in model.named_modules() if module.training}


def pins(model):
    return {name for name, module in model.named_modules() if "train" in vars(module)}


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    """The names of the parameters and buffers whose bits differ from those of before."""
    state = model.state_dict()
    assert state.keys() == before.keys() and state
    return {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}


def train_epochs(model, wrapper=None, size=(3, 5, 6), epochs=2):
    """As a user's loop does it: `train()` at the start of each epoch, `eval()` at its end."""
    torch.manual_seed(0)
    wrapper = wrapper or model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(epochs):
        wrapper.train()
        wrapper(torch.randn(4, *size) * 2 + 3).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # or the small nets explode
        optimizer.step()
        optimizer.zero_grad()
        wrapper.eval()


# --- what is frozen -----------------------------------------------------------------------------


def test_table():
    model = make_model()
    freeze_except(model, ["head"])
    assert trainable(model) == {"head.weight", "head.bias"}
    assert training(model) == {"", "drop", "head"}
    freeze_except(model, ["body", "head"])
    assert trainable(model) == {
        *("body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias"),
        *("head.weight", "head.bias"),
    }
    assert training(model) == {"", "body", *(f"body.{i}" for i in range(5)), "drop", "head"}


def test_names_end_at_dots():
    model = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in (4, 40, 14)})
    freeze_except(model, ["layer4"])
    assert trainable(model) == {"layer4.weight", "layer4.bias"}
    freeze_except(model, ["layer40.bias"])
    assert trainable(model) == {"layer40.bias"}
    assert training(model) == {"", "layer40"}


def test_a_module_is_live_when_anything_in_it_trains():
    model = small_vit()
    freeze_except(model, ["class_token", "encoder.layers.encoder_layer_1.mlp", "heads"])
    assert {"class_token", "heads.head.bias"} < trainable(model)
    assert "encoder.pos_embedding" not in trainable(model)
    block = "encoder.layers.encoder_layer_1"
    live = {"", "encoder", "encoder.layers", block, f"{block}.mlp", "heads", "heads.head"}
    # not among them: the dropouts before the frozen block 0 and before block 1's frozen ln_2
    inside = {name for name in training(model) if name.startswith((f"{block}.mlp.", "heads."))}
    assert training(model) == live | inside and len(inside) > 3


@pytest.mark.parametrize(
    ("name", "trained", "on", "off"),
    [
        ("vgg11_bn", "classifier.6", {"classifier.5"}, {"classifier.2"}),
        ("vgg11_bn", "classifier", {"classifier.2", "classifier.5"}, set()),
        ("mobilenet_v3_small", "classifier.3", {"classifier.2"}, set()),
        ("efficientnet_b0", "classifier", {"classifier.0"}, {"features.6.0.stochastic_depth"}),
        ("efficientnet_b0", "features.8", set(), {"classifier.0", "features.6.0.stochastic_depth"}),
        ("swin_t", "head", set(), {"features.1.0.mlp.4", "features.1.0.stochastic_depth"}),
        ("swin_t", "features.1.0.norm2", {"features.1.0.stochastic_depth"}, {"features.1.0.mlp.2"}),
        ("swin_t", "features.1.0.mlp.3", {"features.1.0.mlp.4"}, {"features.1.0.stochastic_depth"}),
    ],
)
def test_dropout_goes_with_the_layer_behind_it(name, trained, on, off):
    """And with the one before it where it is the last, as swin's mlp.4."""
    model = on_meta(name)
    freeze_except(model, [trained])
    kinds = (nn.Dropout, torchvision.ops.StochasticDepth)
    drops = {n for n, module in model.named_modules() if isinstance(module, kinds)}
    assert on | off <= drops
    assert on <= training(model) and not off & training(model)


class Twigs(nn.Module):
    """Modules without parameters in a module that has a parameter and no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.inner = nn.Sequential(nn.ReLU(), nn.Dropout())


def test_without_siblings_a_dropout_goes_with_the_parent():
    model = nn.Sequential(Twigs(), nn.Linear(2, 2), Twigs())
    freeze_except(model, ["0"])
    live = {"", "0", "0.inner", "0.inner.0", "0.inner.1"}
    assert training(model) == live
    freeze_except(model, ["0.scale"])
    assert training(model) == live
    freeze_except(model, ["1"])
    assert training(model) == {"", "1"}


def test_a_name_turns_a_dropout_on():
    model = make_model()
    freeze_except(model, ["stem.2", "body.0", "head"])
    assert training(model) == {"", "stem.2", "body.0", "drop", "head"}
    assert trainable(model) == {"head.weight", "head.bias"}


def test_a_shared_module_is_frozen_where_all_its_places_are():
    drop = nn.Dropout()
    model = nn.Sequential(drop, nn.Linear(2, 2), nn.Sequential(drop, nn.Linear(2, 2)))
    freeze_except(model, ["2"])
    assert drop.training
    freeze_except(model, ["1"])
    assert drop.training
    model.append(nn.Linear(2, 2))
    freeze_except(model, ["3"])
    assert not drop.training


def test_a_tied_parameter_trains_under_any_of_its_names():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    freeze_except(model, ["2"])
    assert trainable(model) == {"0.weight"}
    assert training(model) == {"", "0", "2"}


def test_a_stale_gradient_is_dropped():
    model = make_model()
    model(torch.randn(4, 3, 5, 6)).sum().backward()
    freeze_except(model, ["head"])
    assert model.head.weight.grad is not None
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    before = tensors(model)
    torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9).step()
    assert changed(model, before) == {"head.weight", "head.bias"}


# --- it stays frozen ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "trained"),
    [
        (small_resnet, "fc"),
        (small_mobilenet, "classifier.3"),
        (small_efficientnet, "classifier.1"),
        (make_model, "head"),
    ],
)
def test_only_the_trained_part_moves(build, trained):
    model = build()
    freeze_except(model, [trained])
    before, digest = tensors(model), frozen_digest(model)
    train_epochs(model, size=(3, 5, 6) if build is make_model else (3, 16, 16))
    moved = changed(model, before)
    assert moved and moved <= {f"{trained}.weight", f"{trained}.bias"}
    assert frozen_digest(model) == digest


def test_without_it_the_statistics_drift():
    """The fault itself: else the test above would prove nothing."""
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    model.eval()
    before = tensors(model)
    train_epochs(model)
    assert {"stem.1.running_mean", "body.2.running_var"} < changed(model, before)


@pytest.mark.parametrize(
    ("build", "trained", "probe"),
    [
        (small_resnet, "fc", "avgpool"),
        (small_vit, "heads", "encoder"),
        (small_swin, "head", "avgpool"),
        (small_efficientnet, "classifier", "avgpool"),
        (small_mobilenet, "classifier.3", "avgpool"),
    ],
)
def test_frozen_features_are_those_of_evaluation(build, trained, probe):
    """Functional dropout, as in attention, included."""
    model, seen = build(), []
    # clones, because efficientnet's dropout works in place
    model.get_submodule(probe).register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    images = torch.randn(4, 3, 16, 16)
    freeze_except(model, [trained])
    model.train()(images)
    model.eval()(images)
    unfreeze(model)
    model.train()(images)
    assert torch.equal(seen[0], seen[1]) and not torch.allclose(seen[0], seen[2])


class Parallel(nn.Module):
    """As DistributedDataParallel wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def test_a_wrapper_trains_no_more_than_the_model():
    model = make_model()
    freeze_except(model, ["body.2", "head"])
    live, before = training(model), tensors(model)
    train_epochs(model, Parallel(Parallel(model)))
    norm = {f"body.2.{key}" for key in ("weight", "bias", "running_mean", "running_var")}
    moved = {"head.weight", "head.bias", "body.2.num_batches_tracked", *norm}
    assert changed(model, before) == moved
    assert model.train() is model and training(model) == live
    assert model.stem.train() is model.stem and training(model) == live
    assert model.eval() is model and not training(model)


def test_a_compiled_model_stays_frozen():
    model = make_model()
    freeze_except(model, ["head"])
    live = training(model)
    compiled = torch.compile(model, backend="eager")
    compiled.train()
    compiled(torch.randn(4, 3, 5, 6)).sum().backward()
    assert training(model) == live
    assert model.stem[1].num_batches_tracked == 0
    assert model.stem[0].weight.grad is None and model.head.weight.grad is not None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_frozen_by_itself(how):
    model = make_model()
    freeze_except(model, ["head"])
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert pins(twin) == pins(model) and trainable(twin) == trainable(model)
    assert frozen_digest(twin) == frozen_digest(model)
    unfreeze(model)
    before = tensors(twin)
    train_epochs(twin)
    assert changed(twin, before) == {"head.weight", "head.bias"}
    assert twin.train().stem.training is False and model.train().stem.training is True
    unfreeze(twin)
    assert not pins(twin) and len(training(twin)) == len(list(twin.modules()))


class Chatty(nn.BatchNorm1d):
    def train(self, mode=True):
        self.calls = [*getattr(self, "calls", []), mode]
        return super().train(mode)


def test_a_train_method_of_the_modules_class_still_runs():
    model = nn.Sequential(Chatty(2), nn.Linear(2, 2))
    freeze_except(model, ["1"])
    model[0].calls.clear()
    model.train()
    assert model[0].calls == [True] and not model[0].training


# --- stages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["all names", "unfreeze"])
def test_stages_end_with_no_pins(last):
    model = small_resnet()
    every = [name for name, _ in model.named_children()]
    freeze_except(model, ["fc"])
    assert training(model) == {"", "avgpool", "fc"}  # the pooling goes with fc
    train_epochs(model, size=(3, 16, 16), epochs=1)

    freeze_except(model, ["layer4", "fc"])
    assert {"layer4.0.bn1", "layer4.0.downsample.1"} < training(model)
    assert not {"bn1", "layer3", "layer3.0.bn1"} & training(model)
    before = tensors(model)
    train_epochs(model, size=(3, 16, 16), epochs=1)
    assert {name.split(".")[0] for name in changed(model, before)} == {"layer4", "fc"}
    assert "layer4.0.bn1.running_mean" in changed(model, before)

    unfreeze(model) if last == "unfreeze" else freeze_except(model, every)
    assert not pins(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert training(model) == {name for name, _ in model.named_modules()}
    before = tensors(model)
    train_epochs(model, size=(3, 16, 16), epochs=1)
    assert changed(model, before) == before.keys()

    freeze_except(model, ["fc"])  # and back
    assert training(model) == {"", "avgpool", "fc"}


# --- BatchNorm ----------------------------------------------------------------------------------


def test_norm_mode_eval_keeps_all_statistics_and_trains_the_weights():
    model = make_model()
    freeze_except(model, ["body", "head"], norm_mode="eval")
    assert training(model) == {"", "body", *(f"body.{i}" for i in (0, 1, 3, 4)), "drop", "head"}
    before, digest = tensors(model), frozen_digest(model)
    train_epochs(model)
    assert changed(model, before) == trainable(model)
    assert {"body.2.weight", "body.2.bias"} < trainable(model)
    assert frozen_digest(model) == digest
    freeze_except(model, ["body", "head"])
    assert model.train().body[2].training


def test_norm_mode_train_moves_all_statistics_and_no_frozen_weight():
    model = make_model()
    freeze_except(model, ["head"], norm_mode="train")
    assert training(model) == {"", "stem.1", "body.2", "drop", "head"}
    before, digest = tensors(model), frozen_digest(model)
    train_epochs(model)
    norms = {name for name, _ in model.named_buffers()}
    assert len(norms) == 6
    assert changed(model, before) == norms | {"head.weight", "head.bias"}
    assert frozen_digest(model) == digest  # of what is held still: those statistics are not


@pytest.mark.parametrize("norm_mode", ["auto", "eval", "train"])
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v3_small", "efficientnet_b0"])
def test_norm_modes_of_torchvisions_models(name, norm_mode):
    model = on_meta(name)
    last = [key for key, module in model.named_modules() if isinstance(module, BatchNorm)][-1]
    freeze_except(model, [last], norm_mode)
    norms = [module for module in model.train().modules() if isinstance(module, BatchNorm)]
    live = {"auto": 1, "eval": 0, "train": len(norms)}[norm_mode]
    assert sum(norm.training for norm in norms) == live and len(norms) > 1
    assert trainable(model) == {f"{last}.weight", f"{last}.bias"}


def test_a_batch_norm_without_weights_goes_with_the_next_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2))
    freeze_except(model, ["2"])
    assert training(model) == {"", "1", "2"}
    freeze_except(model, ["0"])
    assert training(model) == {"", "0"}


# --- the digest ---------------------------------------------------------------------------------


def frozen_model(seed=0):
    model = make_model(seed)
    freeze_except(model, ["head"])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_sees_one_bit_of_anything_frozen_and_nothing_else(dtype):
    model = frozen_model().to(dtype)
    digest, seen = frozen_digest(model), set()
    for name, tensor in model.state_dict().items():
        flat = tensor.view(-1)
        bits = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        bits[-1] ^= 1
        if frozen_digest(model) != digest:
            seen.add(name)
        bits[-1] ^= 1
        assert frozen_digest(model) == digest
    assert seen == {name for name in model.state_dict() if not name.startswith("head")}
    assert "stem.1.num_batches_tracked" in seen and len(seen) == 14


def test_the_digest_is_of_values_not_of_their_layout():
    model = frozen_model()
    digest = frozen_digest(model)
    assert int(digest, 16) and digest == frozen_digest(frozen_model())
    model.to(memory_format=torch.channels_last)
    weight = model.stem[0].weight
    assert weight.stride() != weight.contiguous().stride()
    assert frozen_digest(model) == digest
    padded = torch.zeros(5, 2)
    padded[:, 0] = model.stem[1].running_mean
    model.stem[1].running_mean = padded[:, 0]
    assert frozen_digest(model) == digest
    assert frozen_digest(frozen_model(seed=1)) != digest
    assert with_buffer("one", torch.zeros(8)[::4]) == with_buffer("one", torch.zeros(2))
    assert with_buffer("one", torch.zeros(4)[::4]) == with_buffer("one", torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_digest_is_that_of_any_device():
    model = frozen_model()
    digest = frozen_digest(model)
    assert frozen_digest(model.to("cuda")) == digest


def with_buffer(name, buffer):
    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    layer.register_buffer(name, buffer, persistent=False)
    model = nn.Sequential(layer, nn.Linear(2, 2))
    freeze_except(model, ["1"])
    return frozen_digest(model)


def test_the_digest_tells_names_shapes_and_dtypes_apart():
    digests = [
        with_buffer("one", torch.zeros(2, 3)),
        with_buffer("two", torch.zeros(2, 3)),
        with_buffer("one", torch.zeros(3, 2)),
        with_buffer("one", torch.zeros(2, 3, dtype=torch.int32)),
        with_buffer("one", torch.zeros(())),
        with_buffer("one", torch.zeros(0)),
        with_buffer("one", torch.zeros(2, 3, dtype=torch.bool)),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == with_buffer("one", torch.zeros(2, 3))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ([], "empty"),
        ("head", "'head'"),
        (["haed"], r"named 'haed'; did you mean 'head'\?"),
        (["head", "stem.1.wieght"], r"'stem\.1\.wieght'; did you mean 'stem\.1\.weight'\?"),
        (["classifier"], "'classifier'; it has stem, body, head"),
        (["he"], "'he'"),
        ([""], "''"),
        (["head.weight", "head"], r"'head\.weight' and 'head' overlap"),
        (["body", "head", "body.1"], r"'body' and 'body\.1' overlap"),
        (["head", "head"], "'head' and 'head' overlap"),
        (["drop"], "no parameter to train in drop"),
    ],
)
def test_a_wrong_name_touches_nothing(trained, message):
    model = frozen_model()
    model.eval()
    expected = pins(model), trainable(model)
    with pytest.raises(ValueError, match=message):
        freeze_except(model, trained)
    assert (pins(model), trainable(model)) == expected and not training(model)


def test_an_unknown_norm_mode():
    with pytest.raises(ValueError, match="auto, eval, train, got 'frozen'"):
        freeze_except(make_model(), ["head"], norm_mode="frozen")


def test_names_may_come_from_a_generator():
    model = make_model()
    freeze_except(model, (name for name in ("body", "head")))
    assert {name.split(".")[0] for name in trainable(model)} == {"body", "head"}
