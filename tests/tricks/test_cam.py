"""Class activation maps: the papers' numbers, the grad-cam package's, and a network left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import (
    images_of,
    resnet18,
    small_cnn,
    small_swin,
    small_vit,
    state_of,
)
from torch import nn

from tricks.cam import (
    CAM_METHODS,
    GradCam,
    eigen_cam,
    grad_cam,
    grad_cam_plus_plus,
    hires_cam,
    layer_cam,
    normalize_maps,
    score_cam,
    upsample_maps,
)
from tricks.cam_layers import find_layer

CHEAP = CAM_METHODS[:-1]  # Score-CAM runs the network once for every channel
WHY = "parity with jacobgil's grad-cam, a peer that only tests know"


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def maps_of(model, images, classes=None, methods=CHEAP, layer=None, **options):
    with GradCam(model, layer or find_layer(model, images)) as cam:
        return cam(images, classes, methods, **options)


def assert_same_maps(seen, expected, tolerance=0.0):
    """All maps equal, up to a share of each map's largest value."""
    assert seen.maps.keys() == expected.maps.keys() and seen.maps
    assert torch.equal(seen.classes, expected.classes)
    for method, maps in expected.maps.items():
        assert maps.any(), method
        limit = tolerance * maps.abs().amax((-2, -1), keepdim=True)
        assert ((seen.maps[method] - maps).abs() <= limit).all(), method


# -- methods -------------------------------------------------------------------------------------

ACTIVATIONS = [
    [[[1, 2, 0], [3, 0, 6]], [[0, 4, 2], [2, 2, 0]]],
    [[[1, 1, 1], [1, 1, 1]], [[2, 2, 2], [2, 2, 2]]],
]
GRADIENTS = [
    [[[1, -1, 0], [3, 0, -6]], [[2, 0, 1], [0, 4, -1]]],  # means -1/2 and 1
    [[[-1, -1, -1], [-1, -1, -1]], [[-2, -2, -2], [-2, -2, -2]]],  # all against
]
NOTHING = [[0, 0, 0], [0, 0, 0]]
# Grad-CAM++: weights 1/14 + 3/38 = 20/133 and 2/22 + 1/12 + 4/42 = 83/308
TABLE = {
    grad_cam: [[[0, 3, 2], [0.5, 2, 0]], NOTHING],
    grad_cam_plus_plus: [
        [[0.1503759, 1.3786739, 0.5389610], [0.9900889, 0.5389610, 0.9022556]],
        NOTHING,
    ],
    hires_cam: [[[1, -2, 2], [9, 8, -36]], [[-5, -5, -5], [-5, -5, -5]]],
    layer_cam: [[[1, 0, 2], [9, 8, 0]], NOTHING],
}


@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_methods_by_hand(method, dtype):
    activations, gradients = (
        torch.tensor(values, dtype=dtype) for values in (ACTIVATIONS, GRADIENTS)
    )
    before = activations.clone(), gradients.clone()
    maps = method(activations, gradients)
    assert maps.dtype == torch.float32 and maps.shape == (2, 2, 3)
    torch.testing.assert_close(maps, torch.tensor(TABLE[method], dtype=torch.float32))
    assert torch.equal(activations, before[0]) and torch.equal(gradients, before[1])


def by_the_papers(activations, gradients):
    """The four equations as they are printed, one position after the other, in float64."""
    n, channels, height, width = activations.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    maps = {
        method: torch.zeros(n, height, width, dtype=torch.float64)
        for method in ("gradcam", "gradcam++", "hirescam", "layercam")
    }
    for s in range(n):
        for k in range(channels):
            a, g = activations[s, k].double(), gradients[s, k].double()
            mean = sum(g[p] for p in places) / (height * width)
            total = sum(a[p] for p in places)
            alphas = {p: g[p] ** 2 / (2 * g[p] ** 2 + total * g[p] ** 3) for p in places}
            weight = sum(alphas[p] * max(g[p], 0.0) for p in places)
            for p in places:
                maps["gradcam"][s][p] += mean * a[p]
                maps["gradcam++"][s][p] += weight * a[p]
                maps["hirescam"][s][p] += g[p] * a[p]
                maps["layercam"][s][p] += max(g[p], 0.0) * a[p]
    return {m: maps[m] if m == "hirescam" else maps[m].clamp(min=0) for m in maps}


def test_gradient_methods_are_the_papers_equations():
    activations, gradients = torch.rand(3, 5, 4, 3), torch.randn(3, 5, 4, 3)
    methods = {
        "gradcam": grad_cam,
        "gradcam++": grad_cam_plus_plus,
        "hirescam": hires_cam,
        "layercam": layer_cam,
    }
    for name, expected in by_the_papers(activations, gradients).items():
        assert expected.any()
        maps = methods[name](activations, gradients)
        torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", ["after a mean", "at every position"])
def test_hires_cam_sums_to_the_logit_less_its_bias(linear):
    pool = nn.AdaptiveAvgPool2d(1) if linear == "after a mean" else nn.Identity()
    features = 4 if linear == "after a mean" else 4 * 4 * 6
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GELU())
    model = nn.Sequential(body, pool, nn.Flatten(), nn.Linear(features, 5))
    seen = maps_of(model, images_of(3, 8, 12), torch.tensor([0, 3, 4]), ("hirescam",))
    logits = seen.logits[range(3), [0, 3, 4]]
    torch.testing.assert_close(
        seen.maps["hirescam"].sum((1, 2)), logits - model[-1].bias[[0, 3, 4]].detach()
    )


def test_eigen_cam_by_hand():
    # One channel's pattern is three times as long as the other's, and orthogonal to it
    strong, weak = [[3.0, 0.0, 6.0]], [[0.0, 2.0, 0.0]]
    both = torch.tensor([[weak, strong], [strong, weak]])
    torch.testing.assert_close(eigen_cam(both), torch.tensor([strong, strong]))
    # Of one pattern in all channels, the largest magnitude is positive
    pattern, channels = torch.tensor([[1.0, -4.0, 2.0]]), torch.tensor([2.0, -1.0, 2.0])
    one = (channels.view(3, 1, 1) * pattern).unsqueeze(0)
    for activations in (one, -one):
        torch.testing.assert_close(eigen_cam(activations), -3 * pattern.unsqueeze(0))


def test_eigen_cam_of_positive_activations_is_positive_and_needs_no_centring():
    activations = torch.rand(4, 6, 3, 5)
    maps = eigen_cam(activations)
    assert (maps >= 0).all() and maps.dtype == torch.float32
    values = torch.linalg.svdvals(activations.flatten(2))
    torch.testing.assert_close(maps.flatten(1).norm(dim=1), values[:, 0])  # ‖O v₁‖ = σ₁
    # After a LayerNorm the mean over channels, by which one might choose a sign, says nothing
    normed = F.layer_norm(torch.randn(1, 4, 5, 32), (32,)).permute(0, 3, 1, 2)
    assert normed.mean(1).abs().max() < 1e-6 < eigen_cam(normed).max()


def test_score_cam_is_its_slow_loop():
    model, images = small_cnn(), images_of(3, 12, 20)
    activations = model[:5](images).detach()
    activations[1, 2] = 0.25  # the same everywhere
    classes = torch.tensor([4, 0, 2])

    def score(masked, samples):
        return model(masked).gather(1, classes[samples].unsqueeze(1)).squeeze(1)

    expected = torch.zeros(3, 3, 5)
    for s in range(3):
        scores = torch.zeros(8)
        for k in range(8):
            mask = F.interpolate(activations[s : s + 1, k : k + 1], (12, 20), mode="bilinear")[0]
            span = mask.max() - mask.min()
            mask = (mask - mask.min()) / span if span > 0 else torch.zeros_like(mask)
            scores[k] = model((images[s] * mask).unsqueeze(0))[0, classes[s]].detach()
        weights = scores.exp() / scores.exp().sum()
        for k in range(8):
            expected[s] += weights[k] * activations[s, k]
    assert (expected > 0).any()
    for batch_size in (1, 7, 64):
        maps = score_cam(activations, images, score, batch_size)
        torch.testing.assert_close(maps, expected.clamp(min=0))

    asked = torch.stack([classes, (classes + 1) % 5], dim=1)
    two = maps_of(model, images, asked, ("scorecam",)).maps["scorecam"]
    one = maps_of(model, images, classes, ("scorecam",), batch_size=5).maps["scorecam"]
    assert two.shape == (3, 2, 3, 5)
    torch.testing.assert_close(two[:, 0], one)


@pytest.mark.parametrize("method", TABLE, ids=lambda method: method.__name__)
def test_nothing_gives_nothing(method):
    nothing, some = torch.zeros(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for activations, gradients in ((nothing, nothing), (nothing, some), (some, nothing)):
        assert not method(activations, gradients).any()


def test_nothing_gives_nothing_without_gradients_too():
    nothing = torch.zeros(2, 3, 4, 5)
    assert not eigen_cam(nothing).any()
    assert not score_cam(nothing, images_of(2), lambda images, _: images.sum((1, 2, 3))).any()
    for maps in (nothing[0], torch.full((2, 4, 5), 7.0), torch.full((2, 4, 5), -1e-42)):
        assert not normalize_maps(maps).any()


def test_no_method_makes_nan():
    """Poles of Grad-CAM++ included: 2 + g Σa = 0."""
    activations = torch.full((1, 1, 1, 2), -1.0)
    gradients = torch.tensor([[[[1.0, 2.0]]]])
    torch.testing.assert_close(grad_cam_plus_plus(activations, gradients), torch.ones(1, 1, 2))
    tiny = torch.full((1, 2, 2, 2), 1e-30)
    for method in TABLE:
        assert method(tiny, tiny).isfinite().all()


def test_normalize_and_upsample():
    maps = torch.tensor([[[-1.0, 0.0], [1.0, 3.0]], [[5.0, 5.0], [5.0, 5.0]]])
    expected = torch.tensor([[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(normalize_maps(maps), expected)
    assert torch.equal(normalize_maps(maps.double()), expected)
    broken = torch.tensor([[[float("nan"), 0.0], [1.0, 2.0]]])
    assert normalize_maps(broken).isnan().all()
    several = maps.unsqueeze(0).expand(3, 2, 2, 2)
    assert torch.equal(normalize_maps(several), expected.expand(3, 2, 2, 2))
    large = upsample_maps(several, (5, 7))
    assert large.shape == (3, 2, 5, 7) and large.dtype == torch.float32
    direct = F.interpolate(maps.unsqueeze(1), (5, 7), mode="bilinear", align_corners=False)
    assert torch.equal(large[1], direct.squeeze(1))
    ramp = upsample_maps(torch.tensor([[[0.0, 1.0]]]), (2, 4))
    torch.testing.assert_close(ramp, torch.tensor([[[0.0, 0.25, 0.75, 1.0]] * 2]))


@pytest.mark.parametrize(
    "call",
    [
        lambda a: grad_cam(a, a[:1]),
        lambda a: hires_cam(a[0], a[0]),
        lambda a: eigen_cam(a[0]),
        lambda a: score_cam(a, images_of(3), lambda images, _: images.sum((1, 2, 3))),
        lambda a: score_cam(a, images_of(2), lambda images, _: images.sum((1, 2, 3)), 0),
    ],
)
def test_methods_refuse_what_does_not_fit(call):
    with pytest.raises(ValueError, match=r"must (be|have)"):
        call(torch.rand(2, 3, 4, 5))


# -- the peer ------------------------------------------------------------------------------------


def spatial(tokens):
    """The package's own advice for a vit of 4 × 4 patches: without the class token, as a grid."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


PEERS = {
    "resnet18": (resnet18, "layer4", "fc", None, (64, 96)),
    "vit": (small_vit, "encoder.layers.encoder_layer_2.ln_1", "heads.head", spatial, (32, 32)),
    "swin": (small_swin, "norm", "head", lambda output: output.permute(0, 3, 1, 2), (32, 48)),
}


def their_maps(theirs, images, targets):
    """The package's maps of its layer before it cuts, scales and resizes them."""
    theirs(images, targets)
    tensors = theirs.activations_and_grads
    activations = tensors.activations[0].numpy()
    gradients = tensors.gradients[0].numpy() if tensors.gradients else None
    asked = images, theirs.target_layers[0], targets, activations, gradients
    image = theirs.get_cam_image(*asked, eigen_smooth=False)
    return torch.from_numpy(image)


@pytest.mark.parametrize("name", PEERS)
def test_maps_equal_the_packages(name):
    package = pytest.importorskip("pytorch_grad_cam", reason=WHY)
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    make, layer, head, reshape, size = PEERS[name]
    model = make()
    with torch.no_grad():  # gradients so large that the package's 1e-6 in Grad-CAM++ is nothing
        model.get_submodule(head).weight *= 1e4
    images, classes = images_of(3, *size), torch.tensor([4, 0, 2])
    targets = [ClassifierOutputTarget(int(c)) for c in classes]
    assert find_layer(model, images) == layer
    seen = maps_of(model, images, classes)
    module = model.get_submodule(layer)
    kinds = {
        "gradcam": package.GradCAM,
        "gradcam++": package.GradCAMPlusPlus,
        "hirescam": package.HiResCAM,
        "layercam": package.LayerCAM,
    }
    for method, kind in kinds.items():
        with kind(model, [module], reshape_transform=reshape) as theirs:
            expected = their_maps(theirs, images, targets)
        if method != "hirescam":
            expected = expected.relu()
        assert expected.any() and expected.shape == seen.maps[method].shape
        scale = expected.abs().amax()
        torch.testing.assert_close(
            seen.maps[method] / scale, expected / scale, rtol=1e-4, atol=1e-5, msg=method
        )
    # Eigen-CAM: the package centres the activations, and its sign is chance
    with package.EigenCAM(model, [module], reshape_transform=reshape) as theirs:
        expected = their_maps(theirs, images, targets)
        activations = theirs.activations_and_grads.activations[0]
    centred = eigen_cam(activations - activations.mean((2, 3), keepdim=True))
    signs = (centred * expected).sum((1, 2)).sign().view(-1, 1, 1)
    scale = expected.abs().amax()
    torch.testing.assert_close(centred / scale, signs * expected / scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.maps["eigencam"], eigen_cam(activations), rtol=1e-4, atol=1e-4)


def test_the_packages_constant_spoils_its_grad_cam_plus_plus():
    """With gradients of 1e-4 its weights are sums of cubes; the paper's equation has no such scale.

    Where Σ A is small, α is ½ everywhere, and the weights are half the sums of ReLU(G).
    """
    package = pytest.importorskip("pytorch_grad_cam", reason=WHY)
    activations = torch.rand(1, 4, 3, 5)
    gradients = torch.tensor([1.0, 0.1, 2.0, 0.3]).view(1, 4, 1, 1) * torch.rand(1, 4, 3, 5) * 1e-4
    weights = gradients.sum((2, 3), keepdim=True) / 2
    expected = (weights * activations).sum(1)
    maps = grad_cam_plus_plus(activations, gradients)
    torch.testing.assert_close(maps, expected, rtol=1e-2, atol=0)
    with package.GradCAMPlusPlus(small_cnn(), [nn.Identity()]) as theirs:
        peers = theirs.get_cam_weights(None, None, None, activations.numpy(), gradients.numpy())
    cubes = gradients.pow(3).sum((2, 3)) / 1e-6
    torch.testing.assert_close(torch.from_numpy(peers), cubes, rtol=0.1, atol=0)


def test_score_cam_equals_the_packages_but_for_its_corners(monkeypatch):
    package = pytest.importorskip("pytorch_grad_cam", reason=WHY)
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images, classes = small_cnn(), images_of(2, 24, 40), torch.tensor([3, 1])
    seen = maps_of(model, images, classes, ("scorecam",)).maps["scorecam"]
    targets = [ClassifierOutputTarget(int(c)) for c in classes]
    with package.ScoreCAM(model, [model[4]]) as theirs:
        theirs.batch_size = 8
        aligned = their_maps(theirs, images, targets)
        monkeypatch.setattr(
            nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear")
        )
        expected = their_maps(theirs, images, targets)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-6)
    assert (seen - aligned).abs().max() > 1e-4 * seen.max()


# -- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["layer3", "layer3.1.conv2", "layer2.0.downsample.0"])
def test_a_layer_by_name_and_by_module(layer):
    model, images = resnet18(), images_of(2, 64, 96)
    by_name = maps_of(model, images, layer=layer)
    assert_same_maps(maps_of(model, images, layer=model.get_submodule(layer)), by_name)
    stride = {"layer3": 16, "layer2": 8}[layer[:6]]
    assert by_name.maps["gradcam"].shape == (2, 64 // stride, 96 // stride)


def test_an_unknown_layer_lists_the_nearest_first():
    model = resnet18()
    with pytest.raises(ValueError, match=r"named 'layre4'; the nearest are layer4, layer"):
        GradCam(model, "layre4")
    with pytest.raises(ValueError, match="Conv2d given as layer is not in the model"):
        GradCam(model, nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="layer must be a module or its name, got None"):
        GradCam(model, None)


@pytest.mark.parametrize("layer", ["avgpool", "fc"])
def test_a_layer_without_positions(layer):
    with pytest.raises(ValueError, match=f"layer '{layer}' gives .* which has no positions"):
        maps_of(resnet18(), images_of(2, 64, 96), layer=layer)


def test_a_layer_that_does_not_run_or_does_not_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle, self.lost = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(3))
            self.pair, self.fc = nn.MultiheadAttention(4, 1, batch_first=True), nn.Linear(4, 5)

        def forward(self, x):
            self.lost(x)
            tokens = self.body(x).flatten(2).mT
            return self.fc(self.pair(tokens, tokens, tokens)[0].mean(1))

    for layer, message in {
        "idle": "does not run",
        "lost": "the logits don't depend on layer 'lost'",
        "pair": "gives a tuple",
    }.items():
        with pytest.raises(ValueError, match=message):
            maps_of(Net(), images_of(2, 4, 6), layer=layer)


def test_a_module_that_runs_several_times_counts_with_its_last_run():
    model, images = resnet18(), images_of(2, 64, 96)
    expected = maps_of(model, images, layer="layer4")
    assert_same_maps(maps_of(model, images, layer="layer4.1.relu"), expected)


# -- the network ---------------------------------------------------------------------------------


def test_one_pass_gives_each_image_the_map_of_its_class():
    model, images = resnet18(), images_of(5, 64, 96)
    classes = torch.tensor([4, 0, 2, 2, 1])
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    together = maps_of(model, images, classes, layer="layer4")
    handle.remove()
    assert len(passes) == 1
    assert together.logits.shape == (5, 5) and torch.equal(together.classes, classes)
    torch.testing.assert_close(together.logits, model(images).detach())
    for i in range(5):
        alone = maps_of(model, images[i : i + 1], classes[i : i + 1])
        for method, maps in together.maps.items():
            scale = maps[i].abs().max()
            assert (alone.maps[method][0] - maps[i]).abs().max() <= 1e-4 * scale


def test_the_predicted_class_is_the_default():
    model, images = small_cnn(), images_of(8)
    nn.init.zeros_(model[7].bias)
    predicted = model(images).argmax(1)
    seen = maps_of(model, images)
    assert torch.equal(seen.classes, predicted) and len(predicted.unique()) > 1
    assert_same_maps(seen, maps_of(model, images, predicted))


def test_several_classes_from_one_forward_pass():
    model, images = small_cnn(), images_of(3)
    classes = torch.tensor([[0, 4], [1, 1], [3, 0]])
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    both = maps_of(model, images, classes, layer="4")
    handle.remove()
    assert len(passes) == 1 and both.maps["gradcam"].shape == (3, 2, 8, 12)
    for k in range(2):
        one = maps_of(model, images, classes[:, k])
        for method, maps in both.maps.items():
            assert torch.equal(maps[:, k], one.maps[method])
    every = maps_of(model, images, torch.arange(5).expand(3, 5), ("hirescam",)).maps["hirescam"]
    assert torch.equal(every[0, 4], both.maps["hirescam"][0, 1])


def test_why_this_class_rather_than_that():
    """HiResCAM is linear in the gradient: the difference's map is the maps' difference."""
    model, images = small_cnn(), images_of(3)
    this, that = torch.tensor([0, 1, 3]), torch.tensor([4, 2, 0])
    seen = maps_of(model, images, this, ("hirescam", "scorecam"), against=that)
    one, other = (maps_of(model, images, c, ("hirescam",)).maps["hirescam"] for c in (this, that))
    torch.testing.assert_close(seen.maps["hirescam"], one - other)
    plain = maps_of(model, images, this, ("scorecam",)).maps["scorecam"]
    assert not torch.allclose(seen.maps["scorecam"], plain)


def test_methods_from_one_pass_are_each_methods_own():
    model, images = small_cnn(), images_of(2)
    together = maps_of(model, images, methods=CAM_METHODS)
    assert tuple(together.maps) == CAM_METHODS
    for method in CAM_METHODS:
        alone = maps_of(model, images, methods=(method,))
        assert torch.equal(alone.maps[method], together.maps[method]), method
        assert alone.maps[method].dtype == torch.float32
        assert not alone.maps[method].requires_grad


def test_no_graph_before_the_layer():
    model, images = resnet18(), images_of(2, 64, 96)
    needed = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: needed.update({name: output.requires_grad})
        )
        for name, module in model.named_modules()
    ]
    maps_of(model, images, layer="layer4")
    for handle in handles:
        handle.remove()
    assert needed["fc"] and needed[""]
    assert not any(needed[name] for name in ("conv1", "layer3", "layer4.0", "layer4.1"))


def test_an_in_place_relu_after_the_layer_leaves_its_activations_alone():
    model, images = small_cnn(inplace=True), images_of(3)
    plain = small_cnn(inplace=False)
    plain.load_state_dict(model.state_dict())
    classes = torch.tensor([0, 4, 2])
    for layer in ("1", "3", "4"):
        expected = maps_of(plain, images, classes, layer=layer)
        assert_same_maps(maps_of(model, images, classes, layer=layer), expected, 1e-6)
    assert maps_of(model, images, classes, ("eigencam",), "3").maps["eigencam"].min() < 0


def test_a_network_that_begins_in_place():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    images = images_of(2)
    before = images.clone()
    net = Net(*small_cnn())
    assert find_layer(net, images) == "4" and maps_of(net, images).maps["gradcam"].any()
    assert torch.equal(images, before)


NETWORKS = [(resnet18, (64, 96)), (small_vit, (32, 32)), (small_swin, (32, 48))]


@pytest.mark.parametrize(("make", "size"), NETWORKS)
def test_frozen_weights(make, size):
    model, images = make(), images_of(2, *size)
    expected = maps_of(model, images)
    model.requires_grad_(False)
    before = state_of(model)
    assert_same_maps(maps_of(model, images), expected, 1e-5)  # torch attends another way
    assert state_of(model) == before


@pytest.mark.parametrize(("make", "size"), NETWORKS)
def test_under_no_grad_and_in_inference_mode(make, size):
    model, images = make(), images_of(2, *size)
    expected = maps_of(model, images)
    with torch.no_grad():
        assert_same_maps(maps_of(model, images), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        made_here = images * 1
        seen = maps_of(model, made_here, methods=CHEAP)
        assert torch.is_inference_mode_enabled()
    assert_same_maps(seen, expected)
    assert_same_maps(maps_of(model, made_here), expected)  # after inference
    assert torch.is_grad_enabled() and not seen.maps["gradcam"].is_inference()


def test_wrapped_models():
    model, images = small_cnn(), images_of(2)
    expected = maps_of(model, images)
    assert_same_maps(maps_of(nn.DataParallel(model), images), expected)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert_same_maps(maps_of(wrapped, images, layer="4"), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_models_run_as_they_were_written():
    def never(graph, inputs):
        raise AssertionError("compiled")

    model, images = small_cnn(), images_of(2)
    expected = maps_of(model, images)
    assert_same_maps(maps_of(torch.compile(model, backend=never), images), expected)
    in_place = copy.deepcopy(model)
    in_place.compile(backend=never)
    assert_same_maps(maps_of(in_place, images), expected)
    in_part = copy.deepcopy(model)
    in_part[3] = torch.compile(in_part[3], backend=never)
    assert_same_maps(maps_of(in_part, images), expected)
    with pytest.raises(Exception, match="compiled"):
        in_place(images)  # it is compiled again


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005), (torch.float64, 1e-4)]
)
def test_other_dtypes(dtype, tolerance):
    """Measured on this network: 1.5e-2 of the largest value in bfloat16, 1.4e-3 in float16."""
    model, images = resnet18(), images_of(2, 64, 96)
    classes = torch.tensor([0, 3])
    expected = maps_of(model, images, classes)
    seen = maps_of(model.to(dtype), images, classes)
    assert_same_maps(seen, expected, tolerance)
    assert {maps.dtype for maps in seen.maps.values()} == {torch.float32}
    assert seen.logits.dtype == torch.float32 and next(model.parameters()).dtype == dtype


def test_under_autocast():
    model, images = resnet18(), images_of(2, 64, 96)
    classes = torch.tensor([0, 3])
    expected = maps_of(model, images, classes)
    with torch.autocast("cpu", torch.bfloat16):
        seen = maps_of(model, images, classes)
    assert_same_maps(seen, expected, 0.05)


def test_modes_stay_each_modules_own():
    """In train mode, with parts in eval mode; and what has its own idea of `train` is not asked."""

    class Stubborn(nn.Dropout):
        def train(self, mode=True):
            raise AssertionError("train was called")

    model, images = small_cnn(), images_of(4)
    expected = maps_of(model, images)
    model.train()
    model[1].eval()
    model.add_module("8", Stubborn())
    before = state_of(model)
    assert_same_maps(maps_of(model, images), expected)
    assert state_of(model) == before and model.training and not model[1].training


def test_nothing_is_left_behind():
    """No byte, gradient, hook, mode or random number, in training with gradients at hand."""
    model, images = resnet18().train(), images_of(4, 64, 96)
    F.cross_entropy(model(images), torch.arange(4)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    before, random = state_of(model), torch.get_rng_state()
    with GradCam(model, find_layer(model, images)) as cam:
        cam(images, methods=CHEAP)
        cam(images, torch.arange(5).expand(4, 5))
        assert len(model.layer4._forward_hooks) == 1
    assert state_of(model) == before and torch.equal(torch.get_rng_state(), random)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_the_hook_sleeps_between_calls():
    model, images = small_cnn(), images_of(2)
    plain = model(images)
    with GradCam(model, "4") as cam:
        cam(images)
        between = model(images)
        assert torch.equal(between, plain) and between.requires_grad
        between.sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("at", ["before the layer", "after the layer", "while looking for it"])
def test_an_error_in_the_network_leaves_nothing_behind(at):
    class Faulty(nn.Module):
        def forward(self, x):
            raise ArithmeticError("on purpose")

    place = 1 if at == "before the layer" else 5
    parts = list(small_cnn())
    model = nn.Sequential(*parts[:place], Faulty(), *parts[place:]).train()
    before = state_of(model)
    layer = None if at == "while looking for it" else ("4" if place == 5 else "5")
    with pytest.raises(ArithmeticError, match="on purpose"):
        maps_of(model, images_of(2), layer=layer)
    assert state_of(model) == before and torch.is_grad_enabled()


def test_an_error_in_the_block_leaves_nothing_behind():
    model = small_cnn()
    before = state_of(model)
    with pytest.raises(IndexError), GradCam(model, "4") as cam:
        cam(images_of(2))
        raise IndexError
    assert state_of(model) == before
    with pytest.raises(RuntimeError, match="with GradCam"):
        cam(images_of(2))
    with cam:  # and again
        assert cam(images_of(2)).maps["gradcam"].any()
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 12)}, r"images must be floats"),
        ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.uint8)}, r"images must be floats"),
        ({"classes": torch.tensor([0])}, r"classes must be int64 of shape \(2,\)"),
        ({"classes": torch.tensor([0.0, 1.0])}, r"classes must be int64"),
        ({"classes": torch.zeros(2, 0, dtype=torch.int64)}, r"classes must be int64"),
        ({"classes": torch.tensor([0, 5])}, r"classes must be in \[0, 5\), got 0 to 5"),
        ({"against": torch.tensor([[0], [1]])}, r"against must have the shape of classes"),
        ({"against": torch.tensor([-1, 1])}, r"against must be in \[0, 5\), got -1 to 1"),
        ({"methods": ("gradcam", "layrcam")}, r"'layrcam'; did you mean 'layercam'"),
        ({"methods": "gradcam"}, r"methods must be a list"),
        ({"methods": ("scorecam",), "batch_size": 0}, r"batch_size must be ≥ 1, got 0"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    model = small_cnn()
    before = state_of(model)
    arguments = {"images": images_of(2, 8, 12), "classes": torch.tensor([0, 4])}
    with GradCam(model, "4") as cam, pytest.raises(ValueError, match=message):
        cam(**{**arguments, **change})
    assert state_of(model) == before


def test_refuses_a_network_that_gives_no_logits():
    with pytest.raises(ValueError, match=r"must give logits \(1, classes\), got \(1, 6, 16, 24\)"):
        maps_of(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1)), images_of(2))
