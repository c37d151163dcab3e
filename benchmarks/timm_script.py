"""timm's training parts, a peer: its loader with rand-m9 and erasing, Mixup, ModelEmaV3.

    python benchmarks/timm_script.py --pixels x.npy --labels y.npy --steps 30 --settings best

The same network, batch, optimizer and work as train.py's: crop, flip, RandAugment of magnitude 9,
random erasing of a quarter, mixup or CutMix, smoothed labels, clipping, averaged weights.

- defaults: what timm's train.py does unless told otherwise: four workers, its prefetcher, fp32,
  NCHW, no pinned memory, one thread pool as torch has it.
- best: --precision as given (that of train.py), channels_last, prefetcher, pinned memory on a GPU,
  --workers workers that persist, cuDNN's benchmark and TF32 as train.py has them, fused SGD.
"""

import argparse
import json
import time

import numpy as np
import timm.data
import timm.loss
import torch
import torchvision
from PIL import Image
from timm.utils import ModelEmaV3, dispatch_clip_grad

BATCH, PIXELS = 128, 32


class Pictures(torch.utils.data.Dataset):
    """Decoded images in memory; timm's loader sets the transform."""

    transform = None

    def __init__(self, pixels, labels):
        self.pixels, self.labels = np.load(pixels), np.load(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--settings", choices=("defaults", "best"), required=True)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    best = args.settings == "best"
    if best and args.threads:
        torch.set_num_threads(args.threads)
    if best:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    loader = timm.data.create_loader(
        Pictures(args.pixels, args.labels), (3, PIXELS, PIXELS), BATCH, is_training=True,
        auto_augment="rand-m9", re_prob=0.25, num_workers=args.workers if best else 4,
        pin_memory=best and device.type == "cuda", device=device, interpolation="bilinear",
        train_crop_mode="rkrc", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    )  # fmt: skip
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    model.to(device, memory_format=torch.channels_last if best else torch.contiguous_format)
    fused = best and device.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=fused
    )
    mixup = timm.data.Mixup(
        mixup_alpha=0.2, cutmix_alpha=1.0, prob=1.0, label_smoothing=0.1, num_classes=10
    )
    criterion = timm.loss.SoftTargetCrossEntropy()
    average = ModelEmaV3(model, decay=0.9999)
    autocast = best and args.precision == "bf16"

    def endless():
        while True:
            yield from loader

    for step, (images, labels) in enumerate(endless()):
        if step in (args.warmup, args.warmup + args.steps):
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if step > args.warmup:
                break
            start = time.perf_counter()
        images, targets = mixup(images, labels)
        if best:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = criterion(model(images), targets)
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=step)
    print(json.dumps({"images_per_second": args.steps * BATCH / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
