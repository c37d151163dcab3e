"""Grad-CAM of 16 images at a time: tricks/cam.py against the package grad-cam.

    python benchmarks/gradcam.py

The same network (random weights, eval mode, fp32) and the same images, in turns: a map for the
predicted class of every image, at the image's resolution. The package is given the target layer, as
it wants it; ours has found it once, before. The two give the same maps, which is checked.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from pytorch_grad_cam import GradCAM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tricks.cam import GradCam, normalize_maps, upsample_maps

BATCH = 16


def ours(cam, images):
    maps = cam(images).maps["gradcam"]
    return upsample_maps(normalize_maps(maps), images.shape[2:]).cpu()


def package(cam, images):
    return torch.from_numpy(cam(input_tensor=images, targets=None))


def speeds_of(model, images, rounds):
    """[(ours, the package's)] in images/s, one a round."""
    with GradCam(model) as own:
        own(images[:1])
        with GradCAM(model=model, target_layers=[model.get_submodule(own.layer)]) as other:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, batch {BATCH}, {args.size} px\n")
    print("| network | ours, images/s | grad-cam, images/s | ratio (min–max) | n |")
    print("|---|---|---|---|---|")
    for name in args.models:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, num_classes=10).eval().to(device)
        images = torch.randn(BATCH, 3, args.size, args.size, device=device)
        speeds = speeds_of(model, images, args.rounds)
        ratios = [a / b for a, b in speeds]
        a, b = (statistics.median(side) for side in zip(*speeds, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {name} | {a:.1f} | {b:.1f} | {ratio} | {len(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
