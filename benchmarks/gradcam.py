"""Grad-CAM of 16 images at a time: tricks/cam.py against the package grad-cam.

    python benchmarks/gradcam.py

The same network (random weights, eval mode, fp32) and the same images, in turns: a map for the
predicted class of every image, at the image's resolution. The package is given the target layer, as
it wants it; ours has found it once, before. The two give the same maps, which is checked.
"""

import time

import torch
import torchvision
from measure import Row, parser, read, report
from pytorch_grad_cam import GradCAM

from tricks.cam import GradCam, normalize_maps, upsample_maps
from tricks.cam_layers import find_layer

BATCH = 16


def ours(cam, images):
    maps = cam(images).maps["gradcam"]
    return upsample_maps(normalize_maps(maps), images.shape[2:]).cpu()


def package(cam, images):
    return torch.from_numpy(cam(input_tensor=images, targets=None))


def speeds_of(model, images, rounds):
    """[(ours, the package's)] in images/s, one a round."""
    layer = find_layer(model, images)
    peer = GradCAM(model=model, target_layers=[model.get_submodule(layer)])
    with GradCam(model, layer) as own, peer as other:
        sides = [(ours, own), (package, other)]
        first, second = (run(cam, images) for run, cam in sides)
        off = (first - second).abs().max().item()
        assert off < 0.02, f"the maps differ by {off}"  # cv2 rounds where it resizes
        speeds = []
        for _ in range(rounds):
            seconds = []
            for run, cam in sides:
                began = time.perf_counter()
                run(cam, images)
                seconds.append(time.perf_counter() - began)
            speeds.append([BATCH / s for s in seconds])
    return speeds


def main():
    arg_parser = parser(__doc__, rounds=7)
    arg_parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    arg_parser.add_argument("--size", type=int, default=224, help="px")
    args = read(arg_parser)
    size = 64 if args.quick else args.size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.models[:1] if args.quick else args.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, num_classes=10).eval().to(device)
        images = torch.randn(BATCH, 3, size, size, device=device)
        speeds = speeds_of(model, images, args.rounds)
        rows.append(Row(f"Grad-CAM, {name}: ours / grad-cam", [a / b for a, b in speeds], 1.5))
        rows.append(Row(f"Grad-CAM, {name}: ours, images/s", [a for a, _ in speeds]))
    report(args, rows, f"{device}, batch {BATCH}, {size} px")


if __name__ == "__main__":
    main()
