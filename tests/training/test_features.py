"""Kept features: equal to running the network, only where that holds; the probe of auto."""

import types

import pytest
import torch
import torchvision
from torch import nn

from harness.cli.flags import pick
from harness.counters import SampleStreams, generator
from harness.data.batches import Views
from harness.data.pixels import epoch_order
from harness.data.stores import Samples
from harness.errors import UserError
from harness.models import build
from harness.models.heads import heads, start_heads
from harness.training import features, stages
from smallruns import build_parser
from tricks.freeze import freeze_except

SIZE = 32


class Alone:
    """What `extract` uses of an Accelerator, for one of several processes."""

    device = torch.device("cpu")
    is_local_main_process = False

    def __init__(self, index=0, processes=1):
        self.process_index, self.num_processes = index, processes

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def samples(n=70, seed=0):
    rng = generator(seed, "test")
    pixels = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, 3, (n,), generator=rng)
    return Samples(pixels, torch.arange(n).flip(0), labels)


def views(augment="basic"):
    return Views(SIZE, (0.5,) * 3, (0.25,) * 3, augment=augment, padding=4, flip_prob=0.5,
                 erasing=0.0, ops=2, magnitude=9)  # fmt: skip


def small(name="shufflenet_v2_x0_5"):
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=3)


HEADS = {
    "resnet18": "fc",
    "densenet121": "classifier",
    "mobilenet_v3_small": "classifier.3",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "vgg11_bn": "classifier.6",
    "swin_t": "head",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_tail_of_the_features_is_the_network(name):
    model = small(name)
    freeze_except(model, [HEADS[name]])
    cut = features.cut_at_head(model)
    assert features.can_cache(model, SIZE, cut)
    assert {id(p) for p in cut.tail.parameters()} == {
        id(p) for n, p in model.named_parameters() if n.startswith(HEADS[name])
    }
    # Dropout before the head stays with the head and goes on acting
    kinds = [type(module).__name__ for module in cut.tail.modules()]
    wanted = name in ("mobilenet_v3_small", "efficientnet_b0", "vgg11_bn")
    assert ("Dropout" in kinds) == wanted
    assert all(m.training for m in cut.tail.modules() if isinstance(m, nn.Dropout))


def test_can_cache_leaves_the_model_as_it_was():
    model = small()
    freeze_except(model, ["fc"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    assert features.can_cache(model, SIZE, features.cut_at_head(model))
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "trained", "mode"),
    [
        ("shufflenet_v2_x0_5", ["conv5", "fc"], "auto"),  # more than the head trains
        ("shufflenet_v2_x0_5", ["fc"], "train"),  # BatchNorm of the frozen part adapts
        ("googlenet", ["fc"], "auto"),  # its dropout stands outside of the tail
        ("squeezenet1_1", ["classifier.1"], "auto"),  # it goes on after its head
        ("timm", ["fc"], "auto"),  # its dropout is a function
    ],
)
def test_what_is_not_constant_is_not_kept(name, trained, mode):
    size = 64
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    if name == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("resnet10t", num_classes=3, drop_rate=0.2)
    else:
        model = torchvision.models.get_model(name, weights=None, num_classes=3, **arguments)
    freeze_except(model, trained, mode)
    assert not features.can_cache(model, size, features.cut_at_head(model))


def test_kept_features_give_the_logits_of_the_network():
    model, split, preprocessing = small(), samples(), views()
    freeze_except(model, ["fc"])
    kept = features.extract(Alone(), model, split, preprocessing, 3, 7, {}, "train")
    assert kept.stored.shape == (70, 3, 1024) and torch.equal(kept.labels, split.labels)
    every = torch.arange(70)
    tail = features.cut_at_head(model).tail
    with torch.no_grad():
        images, labels = split.take(every, torch.device("cpu"))
        expected = model(preprocessing.evaluation(images))
        torch.testing.assert_close(tail(kept.stored[:, 0]), expected)
        # Another view is the augmented one
        drawn, _ = features.view_batch(split, preprocessing, every, 2, 7)
        torch.testing.assert_close(tail(kept.stored[:, 2]), model(drawn))
    assert not torch.equal(kept.stored[:, 0], kept.stored[:, 1])
    assert not torch.equal(kept.stored[:, 1], kept.stored[:, 2])
    taken, taken_labels = kept.take(torch.tensor([5, 3]), torch.device("cpu"))
    assert torch.equal(taken, kept.stored[[5, 3]]) and torch.equal(taken_labels, labels[[5, 3]])


def test_every_epoch_draws_a_view_of_every_image():
    kept = torch.arange(4 * 3).view(4, 3, 1).float()
    cached = features.CachedViews(3)
    draw = cached.draw(4, SampleStreams(0, "views", 1, places=torch.arange(4)))
    assert torch.equal(cached.train(kept, draw).squeeze(1), kept[range(4), draw["view"], 0])
    assert torch.equal(cached.evaluation(kept), kept[:, 0])
    streams = SampleStreams(0, "views", 2, places=torch.arange(3000))
    counts = torch.bincount(cached.draw(3000, streams)["view"], minlength=3)
    assert counts.min() > 900


def test_nothing_is_computed_twice():
    model, split, known = small().eval(), samples(8), {}
    features.extract(Alone(), model, split, views(), 1, 7, known, "train")
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    kept = features.extract(Alone(), model, split, views(), 2, 7, known, "train")
    assert len(calls) == 1 and kept.stored.shape[1] == 2
    features.extract(Alone(), model, split, views(), 2, 7, known, "train")
    assert len(calls) == 1
    handle.remove()


def test_other_augmentation_is_another_view():
    """But the first view is the same whatever the augmentation is."""
    model, split, known = small().eval(), samples(8), {}
    basic = features.extract(Alone(), model, split, views(), 2, 7, known, "train").stored
    none = features.extract(Alone(), model, split, views("none"), 2, 7, known, "train").stored
    assert torch.equal(basic[:, 0], none[:, 0]) and not torch.equal(basic[:, 1], none[:, 1])
    torch.testing.assert_close(none[:, 1], none[:, 0])


def test_features_are_kept_until_another_part_trains():
    model, blocks = small(), build.blocks(small(), "shufflenet_v2_x0_5")
    text = (
        "--stages=[{epochs: 1, train: {head: 1}}, {epochs: 1, train: {head: 1}, augment: none},"
        "{epochs: 1, train: {all: 1}}, {epochs: 1, train: {head: 1}}]"
    )

    def kept(*argv):
        args = build_parser("finetune.py").read([text, *argv])
        options = [pick(kind, args) for kind in (stages.StrategyOptions, stages.StageOptions)]
        made = stages.make_stages(*options, "staged", model, blocks, 9, pretrained=True)
        return features.cacheable_stages(made, model, SIZE)

    assert kept() == ["1 head", "2 head"]
    assert kept("--views=0") == [] == kept("--mix_prob=1")
    assert kept("--mix_prob=1", "--mixup_alpha=0", "--cutmix_alpha=0") == ["1 head", "2 head"]
    assert kept("--bn_mode=train") == ["1 head", "2 head"] and kept("--bn_mode=all") == []


def test_the_batches_of_two_processes_are_those_of_one(monkeypatch):
    """Each computes its own, and the sum that joins them is exact."""
    model, split = small().eval(), samples(150)
    monkeypatch.setattr("harness.training.scoring.BATCH", (64, 64))
    alone = features.extract(Alone(), model, split, views(), 2, 7, {}, "train").stored
    halves = []
    monkeypatch.setattr(features, "_from_all", lambda accelerator, found: found)
    for index in range(2):
        half = features.extract(Alone(index, 2), model, split, views(), 2, 7, {}, "train").stored
        halves.append(half)
    owners = (halves[0].abs().sum((1, 2)) > 0).int() + 2 * (halves[1].abs().sum((1, 2)) > 0).int()
    assert owners.tolist() == [1] * 64 + [2] * 64 + [1] * 22
    assert torch.equal(halves[0] + halves[1], alone)


def test_features_that_do_not_fit_in_memory_are_refused(monkeypatch):
    """Two copies of two views, on each of the processes that share the machine."""
    memory = types.SimpleNamespace(available=2 * 140 * 1024 * 4)
    monkeypatch.setattr(features.psutil, "virtual_memory", lambda: memory)
    model = small().eval()
    features.extract(Alone(), model, samples(), views(), 2, 7, {}, "train")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"features of 140 views would take .* fewer --views"):
        features.extract(Alone(), model, samples(), views(), 2, 7, {}, "train")


def test_a_zero_head_does_not_pass_for_features_that_can_be_kept():
    """A distilled DeiT's logits are a mean of two heads'; new ones give zero, whatever they see."""
    model = build.build_model("deit_tiny_distilled_patch16_224", 3, image_size=SIZE)
    start_heads(model, SIZE)
    assert not any(p.any() for _, head in heads(model) for p in head.parameters())
    freeze_except(model, ["head"])
    assert not features.can_cache(model, SIZE, features.cut_at_head(model))
    assert not any(p.any() for _, head in heads(model) for p in head.parameters())


@torch.no_grad()
def test_the_picture_shows_what_the_first_batch_was_computed_from():
    """Shuffled, as training goes, and with the very crops and flips of the kept features."""
    model, split, many = small(), samples(600), views()
    freeze_except(model, ["fc"])
    tail = features.cut_at_head(model).tail
    kept = features.extract(Alone(), model, split, many, 2, 7, {}, "train")
    order = epoch_order(600, 7, 0)[:32]
    assert order.tolist() != sorted(order.tolist())
    for view in range(2):
        images, labels = features.view_batch(split, many, order, view, 7)
        assert torch.equal(labels, split.labels[order])
        torch.testing.assert_close(tail(kept.stored[order, view]), model(images))
