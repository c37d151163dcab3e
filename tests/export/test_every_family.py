"""Every family of torchvision, and twelve networks of timm, as ONNX and torch.export."""

import pytest
import torch
from models.test_models import FAMILIES

from harness.export import graphs
from harness.models import build

TIMM = (
    "resnet18", "resnet26d", "convnext_atto", "efficientnet_lite0", "mobilenetv4_conv_small",
    "regnety_002", "vit_tiny_patch16_224", "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224", "mixer_s32_224", "edgenext_xx_small", "repvit_m0_9",
)  # fmt: skip
CASES = [(name, size) for name, (size, _) in FAMILIES.items()]
CASES += [(f"timm/{name}", 224 if "224" in name else 64) for name in TIMM]


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "size"), CASES, ids=[name for name, _ in CASES])
def test_a_network_is_exported_and_answers_alike(name, size, tmp_path):
    torch.manual_seed(0)
    stem = build.resolve_stem(name, "auto", size)
    model = build.build_model(name, 7, image_size=size, stem=stem).eval()
    classifier = graphs.Classifier(model, (0.5,) * 3, (0.2,) * 3, 1.3).eval()
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    ours = graphs.run_module(classifier, [pixels])
    graphs.write_onnx(classifier, size, tmp_path / "model.onnx", {})
    graphs.write_torch(classifier, size, tmp_path / "model.pt2", {})
    for run, file in ((graphs.run_onnx, "model.onnx"), (graphs.run_torch, "model.pt2")):
        theirs = run(tmp_path / file, pixels.split([1, 2]))
        off, changed = graphs.differences(theirs, ours)
        assert off <= graphs.TOLERANCE and not changed, file
