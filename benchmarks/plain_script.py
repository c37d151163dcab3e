"""The usual script, a peer: PIL transforms in a DataLoader of two workers, fp32, NCHW, an EMA loop.

    python benchmarks/plain_script.py --pixels x.npy --labels y.npy --steps 30 --warmup 5
    python benchmarks/plain_script.py --dataset FOLDER --steps 1

It imports what such a script imports and nothing of ours. The images are arrays in memory, as in
torchvision's CIFAR10 (--pixels uint8 (N, H, W, 3)), or the rows of a `datasets` data set through
`with_transform` (--dataset). Mixup, label smoothing, clipping. It prints JSON: images/s of the
steps after the warm-up.
"""

import argparse
import json
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

BATCH, PIXELS = 128, 32


class Pictures(Dataset):
    """Decoded images in memory, handed out as PIL images, as torchvision's CIFAR10 does."""

    def __init__(self, pixels, labels, transform):
        self.pixels, self.labels, self.transform = np.load(pixels), np.load(labels), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def rows_of(folder, transform):
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    stored = load_dataset(folder, split="train")
    image = next(k for k, v in stored.features.items() if isinstance(v, ImageColumn))
    label = next(k for k in stored.features if k != image)

    def apply(rows):
        images = [transform(picture.convert("RGB")) for picture in rows[image]]
        return {"image": images, "label": rows[label]}

    return stored.with_transform(apply)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels")
    parser.add_argument("--labels")
    parser.add_argument("--dataset")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, default=0)
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    steps = [transforms.RandomCrop(PIXELS, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.RandAugment(), transforms.ToTensor()]
    steps += [transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    each = transforms.Compose([*steps, transforms.RandomErasing(0.25)])
    images = rows_of(args.dataset, each) if args.dataset else Pictures(
        args.pixels, args.labels, each
    )  # fmt: skip
    loader = DataLoader(
        images, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()
    model.to(device)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    mixup = torch.distributions.Beta(0.2, 0.2)

    def endless():
        while True:
            for batch in loader:
                yield (batch["image"], batch["label"]) if args.dataset else batch

    for step, batch in enumerate(endless()):
        if step in (args.warmup, args.warmup + args.steps):
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if step > args.warmup:
                break
            start = time.perf_counter()
        images, labels = (part.to(device, non_blocking=True) for part in batch)
        lam, order = mixup.sample().item(), torch.randperm(BATCH, device=device)
        logits = model(lam * images + (1 - lam) * images[order])
        loss = lam * criterion(logits, labels) + (1 - lam) * criterion(logits, labels[order])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].mul_(0.9999).add_(value, alpha=0.0001)
                else:
                    average[name].copy_(value)
        if step == 0:
            print(f"loss {loss.item():.3f}", flush=True)
    print(json.dumps({"images_per_second": args.steps * BATCH / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
