"""Resuming at 90 % of an epoch: from nothing to the first new batch, against accelerate's way.

    python benchmarks/resume.py

The images are in the `datasets` format; the state is that of ResNet-18, momentum and averaged
weights. Ours finds, verifies (sha256) and restores the checkpoint, and asks for the batch of that
step, which is drawn, gathered and augmented. The peer is accelerate's documented way: `load_state`,
`skip_first_batches`, and the first batch of the prepared loader (PIL transforms in
`with_transform`, two workers). It has two forms. With a stored data set only indices are skipped;
with an iterable one (`to_iterable_dataset`, what streaming gives) every skipped row is read and
transformed. Both are timed from the same point, model built and loader made, to the batch; the step
that follows is the same for both. The second figures leave out reading the state.
"""

import os
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from measure import Row, data_flag, over, parser, read, report
from processes import PIXELS, folder_of
from torch.utils.data import DataLoader
from torchvision import transforms

from harness.data.batches import Views, train_batches
from harness.data.preprocessing import Preprocessing
from harness.data.sources import load_data
from harness.data.stores import decode_splits
from harness.models.build import build_model
from harness.training.checkpoint import newest_valid, save_checkpoint
from harness.training.state import gather_tensors, restore_tensors
from tricks.ema import ModelEma

BATCH, WORKERS = 128, 2
LOOK = Preprocessing(PIXELS, 1.0, "bilinear", (), ())
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Registered:
    def __init__(self, ema):
        self.state_dict, self.load_state_dict = ema.state_dict, ema.load_state_dict


def transform_rows(image_column, label_column):
    steps = [transforms.RandomCrop(PIXELS, padding=4), transforms.RandomHorizontalFlip()]
    steps += [transforms.RandAugment(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    each = transforms.Compose([*steps, transforms.RandomErasing(0.25)])

    def apply(rows):
        images = [each(image.convert("RGB")) for image in rows[image_column]]
        return {"pixel_values": images, "labels": rows[label_column]}

    return apply


def collate(rows):
    images = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in rows])}


def loaders(data, accelerator):
    """The peer's prepared loaders by the kind of data set."""
    apply = transform_rows(data.image_column, data.label_column)
    stored = data.train.dataset
    streamed = stored.to_iterable_dataset(num_shards=WORKERS).shuffle(seed=0, buffer_size=1000)
    streamed = streamed.map(apply, batched=True, batch_size=32, remove_columns=stored.column_names)
    kinds = {
        "stored": DataLoader(
            stored.with_transform(apply), BATCH, shuffle=True, drop_last=True,
            num_workers=WORKERS, collate_fn=collate,
        ),
        "iterable": DataLoader(
            streamed, BATCH, drop_last=True, num_workers=WORKERS, collate_fn=collate
        ),
    }  # fmt: skip
    return {kind: accelerator.prepare(loader) for kind, loader in kinds.items()}


def main():
    arg_parser = parser(__doc__, rounds=5)
    data_flag(arg_parser)
    arg_parser.add_argument("--max_images", type=int, default=10_000, help="of the train split")
    args = read(arg_parser)
    if args.quick:
        args.max_images = 1280
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{temporary}/cache")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        folder, words = folder_of(args.data, temporary, args.max_images)
        data = load_data(folder, test_split="none", max_train_samples=args.max_images)
        split = decode_splits(data, LOOK, progress=False)["train"]
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        prepared = loaders(data, accelerator)
        per_epoch = len(data.train) // BATCH
        first = int(0.9 * per_epoch)

        model = build_model("resnet18", 10, image_size=PIXELS)
        model.to(accelerator.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        module, plain = accelerator.unwrap_model(model), optimizer.optimizer
        ema = ModelEma(module, 0.999)
        accelerator.register_for_checkpointing(Registered(ema))
        model(torch.randn(2, 3, PIXELS, PIXELS, device=accelerator.device)).sum().backward()
        optimizer.step()
        root, saved = Path(temporary) / "checkpoints", f"{temporary}/state"
        save_checkpoint(root, first, gather_tensors(module, plain, ema), {"step": first}, keep=2)
        accelerator.save_state(saved)
        views = Views(PIXELS, MEAN, STD, augment="randaugment", padding=4, flip_prob=0.5,
                      erasing=0.25, ops=2, magnitude=9)  # fmt: skip

        def ours():
            path, tensors, state = newest_valid(root, print)
            restore_tensors(path, tensors, module, plain, ema)
            restored = time.perf_counter()
            batches = train_batches(split, views, accelerator, batch_size=BATCH, seed=0,
                                    accumulation=1, total_steps=per_epoch)  # fmt: skip
            (part,) = next(batches(state["step"]))
            assert len(part.images) == BATCH
            return restored

        def peer(kind):
            accelerator.load_state(saved)
            restored = time.perf_counter()
            skipped = accelerator.skip_first_batches(prepared[kind], first)
            batch = next(iter(skipped))
            assert batch["pixel_values"].shape == (BATCH, 3, PIXELS, PIXELS)
            return restored

        sides = {"ours": ours, **{k: (lambda k=k: peer(k)) for k in prepared}}
        whole, after = ({side: [] for side in sides} for _ in range(2))
        for _ in range(args.rounds):
            for side, resume in sides.items():
                start = time.perf_counter()
                restored = resume()
                whole[side].append(time.perf_counter() - start)
                after[side].append(time.perf_counter() - restored)
    rows = []
    for seconds, what in ((whole, "state and first new batch"), (after, "first new batch alone")):
        for kind in prepared:
            figure = f"resume at 90 %, {what}: ours / skip_first_batches, {kind} data set"
            rows.append(Row(figure, over(seconds["ours"], seconds[kind]), 0.1, at_most=True))
    rows.append(Row("resume at 90 %, ours, state and first new batch, s", whole["ours"]))
    report(args, rows, f"{words}, {len(data.train):,} images, step {first} of {per_epoch}")


if __name__ == "__main__":
    main()
