"""Augmentation of batches against torchvision's and kornia's, on one core.

    python benchmarks/augment.py
    python benchmarks/augment.py --batch 128 --rounds 20 --data FOLDER

Each pipeline is crop + flip + policy + normalise + random erasing of decoded images of 32 px, and
one is random resized crop to 224 + flip + RandAugment + normalise of decoded images of 256 px. Ours
is what train.py does (`harness.data.batches.Views`, draws included): a uint8 batch in, a normalised
channels_last one out, every sample with operations of its own. As in train.py, malloc keeps what is
freed, for all sides. The peers, which take turns with it:

- PIL: torchvision.transforms on PIL images, one by one, stacked at the end;
- v2: torchvision.transforms.v2 on uint8 tensors, one by one, stacked at the end;
- v2, whole batch: the same on the batch, which then gets one crop, flip, operation and box for all
  its images. That is another, weaker augmentation, so nothing is wanted of this ratio;
- kornia: kornia.augmentation on the float batch. Crop, flip, strength and box are a sample's own,
  the operations of its RandAugment, TrivialAugment and AutoAugment those of the whole batch.
"""

from itertools import product

import kornia.augmentation as K
import kornia.augmentation.auto as auto
import numpy as np
import torch
from measure import Row, data_flag, over, parser, read, report, seconds_in_turns
from processes import PIXELS, first_images
from torchvision import transforms as v1
from torchvision.transforms import v2

from harness.counters import SampleStreams
from harness.data.batches import Views
from harness.launch import keep_freed_memory

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NUM_IMAGES = 512  # what a peer goes through in a round; ours goes through OURS times as many
OURS = 8

# torchvision's and kornia's policy, and what is wanted against PIL, v2 one by one, kornia
POLICIES = {
    "randaugment": (
        lambda v: v.RandAugment(2, 9), lambda: auto.RandAugment(2, 9), (6, 6, 3)
    ),
    "trivialaugment": (
        lambda v: v.TrivialAugmentWide(), lambda: auto.TrivialAugment(), (4, None, None)
    ),
    "autoaugment": (
        lambda v: v.AutoAugment(v.AutoAugmentPolicy.CIFAR10),
        lambda: auto.AutoAugment("cifar10"), (4, None, None),
    ),
}  # fmt: skip


def views_of(policy, resized):
    how = {"augment": policy, "flip_prob": 0.5, "ops": 2, "magnitude": 9}
    if resized:
        return Views(224, MEAN, STD, padding=0, erasing=0.0, stored=256, crop_scale=0.08, **how)
    return Views(PIXELS, MEAN, STD, padding=4, erasing=0.25, **how)


def torchvision_pipeline(v, policy, resized):
    crop = v.RandomResizedCrop(224) if resized else v.RandomCrop(PIXELS, padding=4)
    to_float = v.ToTensor() if v is v1 else v.ToDtype(torch.float32, scale=True)
    steps = [crop, v.RandomHorizontalFlip(), policy(v), to_float, v.Normalize(MEAN, STD)]
    return v.Compose(steps if resized else [*steps, v.RandomErasing(0.25)])


def kornia_pipeline(policy, resized):
    crop = K.RandomResizedCrop((224, 224)) if resized else K.RandomCrop((PIXELS, PIXELS), padding=4)
    steps = [crop, K.RandomHorizontalFlip(), policy()]
    steps.append(K.Normalize(torch.tensor(MEAN), torch.tensor(STD)))
    return torch.nn.Sequential(*(steps if resized else [*steps, K.RandomErasing(p=0.25)]))


def compare(policy, batch, pictures, tensors, many, rounds, resized=False):
    """Rows of one pipeline at one batch size."""
    of_torchvision, of_kornia, wanted = POLICIES[policy]
    views = views_of(policy, resized)
    pil, own_v2, whole = (
        torchvision_pipeline(v, of_torchvision, resized) for v in (v1, v2, v2)
    )  # fmt: skip
    kornia = kornia_pipeline(of_kornia, resized)

    def own(views):
        for step, part in enumerate(many.split(batch)):
            streams = SampleStreams(0, "views", step, places=torch.arange(len(part)))
            views.train(part, views.draw(len(part), streams))

    def each(images, transform):
        for start in range(0, len(images), batch):
            torch.stack([transform(image) for image in images[start : start + batch]])

    def batches(transform):
        for part in tensors.split(batch):
            transform(part)

    sides = {
        "ours": lambda: own(views),
        "PIL": lambda: each(pictures, pil),
        "v2": lambda: each(tensors, own_v2),
        "v2, whole batch": lambda: batches(whole),
        "kornia": lambda: batches(lambda part: kornia(part.float() / 255)),
    }
    if resized:  # what faster operations could give at most
        basic = views_of("basic", resized)
        sides["without"] = lambda: own(basic)
    taken = seconds_in_turns(sides, rounds)
    ours, without = taken.pop("ours"), taken.pop("without", None)
    share = len(many) / len(tensors)
    what = "resized crop to 224 + flip + randaugment" if resized else policy
    wanted = dict(zip(("PIL", "v2", "kornia"), (2, None, None) if resized else wanted, strict=True))
    rows = [
        Row(f"{what}, batch {batch}: ours / {peer}",
            [share * ratio for ratio in over(theirs, ours)], wanted.get(peer))
        for peer, theirs in taken.items()
    ]  # fmt: skip
    if without:
        name = f"{what}, batch {batch}: ours without any operation / PIL with them"
        rows.append(Row(name, [share * ratio for ratio in over(taken["PIL"], without)]))
    return [*rows, Row(f"{what}, batch {batch}: ours, images/s", [len(many) / s for s in ours])]


def as_tensors(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def main():
    arg_parser = parser(__doc__, rounds=6)
    data_flag(arg_parser)
    arg_parser.add_argument("--batch", type=int, nargs="+", default=[128, 512], help="batch sizes")
    arg_parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = read(arg_parser)
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    count, times = (max(args.batch), 1) if args.quick else (NUM_IMAGES, OURS)
    pictures = first_images(args.data, count)
    tensors = as_tensors(pictures)
    many = tensors.repeat(times, 1, 1, 1)
    rows = []
    for policy, batch in product(POLICIES, args.batch):
        rows += compare(policy, batch, pictures, tensors, many, args.rounds)
    large = [p.resize((256, 256)) for p in pictures[: 8 if args.quick else 128]]
    tensors = as_tensors(large)
    rows += compare("randaugment", len(large), large, tensors, tensors, args.rounds, resized=True)
    report(args, rows, f"{args.threads} thread(s); {args.data or 'smooth noise'}")


if __name__ == "__main__":
    main()
