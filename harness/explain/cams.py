"""Which network and which images gradcam.py explains, the maps, and how they are checked."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from harness.console import words_of
from harness.counters import generator
from harness.data.cache import reason_of_image
from harness.data.listing import find_files
from harness.data.options import SplitOptions
from harness.data.pixels import image_file
from harness.data.preprocessing import Preprocessing, PreprocessingOptions
from harness.data.sources import load_data
from harness.data.stored import IMAGENET_STATISTICS
from harness.data.stores import evaluation_image
from harness.errors import UserError, nearest
from harness.hub import PREFIX
from harness.models.build import build_model, skeleton
from harness.models.calibration import read_calibration
from harness.models.heads import heads
from harness.models.names import find_model
from harness.models.trained import check_classes, data_flags, load_model, read_trained
from harness.models.weights import find_weights, load_pretrained
from harness.processes import check_same, from_local_main, from_main
from tricks.augment import normalize_batch
from tricks.cam import GradCam, normalize_maps, upsample_maps
from tricks.cam_checks import (
    deletion_insertion,
    heat_in_mask,
    rank_correlation,
    reinitialized_copy,
)
from tricks.cam_layers import find_layer
from tricks.tta import tta_views

# For weights that come without preprocessing
ASSUMED = Preprocessing(224, 0.875, "bilinear", *IMAGENET_STATISTICS)
SHOWN = 16  # images of a split
BATCH = 16  # images whose maps are made at once
PREDICTED = 128  # images that are classified at once, to find right and wrong ones
STEPS = 32  # of deletion and insertion
OF_WEIGHTS = ("weights", "weights_by_order", "mean", "std", "interpolation", "crop_pct")
OF_SPLITS = (
    "split", "indices", "only", "dataset", "image_column", "label_column", "region_column"
)  # fmt: skip


@dataclass(frozen=True)
class NetworkOptions(PreprocessingOptions):
    """The flags that say which network is explained: a run's, or --model with --weights."""

    run: str | None = None
    model: str | None = None
    weights: str | None = None
    weights_by_order: bool = False


@dataclass(frozen=True)
class PictureOptions(SplitOptions):
    """The flags that say which images are explained: files, or a split of the run's data set."""

    images: list[str] | None = None
    indices: list[int] | None = None
    only: str | None = None  # "right", "wrong" or "all"
    max_images: int | None = None
    region_column: str | None = None
    skip_bad: bool = False


@dataclass(frozen=True)
class MapOptions:
    """The flags that say which maps are made, and whether they are checked."""

    layer: str | None = None
    target: str = "predicted"
    contrast: bool = False
    all_classes: bool = False
    check: bool = False
    seed: int = 42


class Network(NamedTuple):
    """A classifier in eval mode, and how it wants its images."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str]
    run: object  # harness.models.trained.Trained, or None
    description: str = ""  # of one that is not a run's: its weights, how it wants images
    temperature: float = 1.0  # which its logits are divided by


class Picture(NamedTuple):
    """One image: uint8 pixels (3, S, S), as the network sees them, its origin and its class."""

    pixels: torch.Tensor
    source: str  # a file, or "test 14"
    true: int | None  # its class, where it is known
    region: torch.Tensor | None  # bool (S, S)
    number: int = 0  # among the pictures


# -- network -------------------------------------------------------------------------------------


def find_network(options) -> Network:
    """The network of the run, or the one that --model and --weights name.

    options: NetworkOptions.
    """
    if bool(options.run) == bool(options.model):
        raise UserError("give the folder of a trained run, or --model and --images")
    if options.run:
        trained = read_trained(options.run)
        calibration = read_calibration(trained)
        return Network(
            trained.name, load_model(trained), trained.preprocessing, trained.classes, trained,
            temperature=calibration["temperature"] if calibration else 1.0,
        )  # fmt: skip
    weights = find_weights(options.weights or "default", options.model)
    if weights.state is None:
        raise UserError("--weights none: a network that has learned nothing has nothing to show")
    preprocessing, origin = weights.preprocessing, weights.origin
    if preprocessing is None:
        preprocessing, origin = (
            ASSUMED,
            "assumed to be ImageNet's: nothing says how the weights want images",
        )
    preprocessing = preprocessing._replace(**options.given())
    number = count_classes(weights, options.model, options.weights_by_order)
    classes = weights.classes or [str(k) for k in range(number)]
    if len(classes) != number:
        raise UserError(f"{weights.label}: {len(classes)} names of classes, and a head of {number}")
    model = build_model(options.model, number, image_size=preprocessing.size, stem=weights.stem)
    loaded = load_pretrained(model, weights, weights.classes, options.weights_by_order)
    if loaded.head_is_new:
        raise UserError(f"{weights.label} has no head to explain: {loaded.text}")
    name = options.model.removeprefix(PREFIX).replace("/", "-")
    return Network(
        name,
        model.eval(),
        preprocessing,
        classes,
        None,
        f"{loaded.text}; images: {origin}{options.as_text()}",
    )


def count_classes(weights, model, by_order):
    """How many classes the head of some weights has; UserError for weights without a head.

    model: the network's name. by_order: of --weights_by_order.
    """
    names = [name for name, _ in heads(skeleton(find_model(model)))]
    states = [value for key, value in weights.state.items() if key == f"{names[0]}.weight"]
    states = [list(weights.state.values())[-1]] if by_order else states
    if not states:
        raise UserError(f"{weights.label} has no head ({names[0]}): its classes are not known")
    return len(states[0])


def check_flags(network_options, picture_options, map_options):
    """Raise UserError for flags that would have no effect."""
    target = map_options.target != "predicted"
    values = vars(network_options) | vars(picture_options) | vars(map_options)
    checks = [
        *((name, network_options.run, "a run has its own") for name in OF_WEIGHTS),
        ("only", picture_options.indices, "--indices names the images"),
        ("max_images", picture_options.indices, "--indices names the images"),
        ("contrast", map_options.all_classes, "--all_classes shows every class"),
        (
            "target",
            map_options.contrast and target,
            "--contrast shows the true and the predicted class",
        ),
        ("target", map_options.all_classes and target, "--all_classes shows every class"),
        ("region_column", not map_options.check, "--check measures the heat in it"),
        *((name, picture_options.images, "--images names the images") for name in OF_SPLITS),
    ]
    for name, has_no_effect, reason in checks:
        if has_no_effect and values[name]:
            raise UserError(f"--{name} has no effect here: {reason}")


def parse_choices(text, choices, flag) -> list[str]:
    """The names in a list with commas; UserError, with the nearest, for one not in choices."""
    names = words_of(text)
    for name in names:
        if name not in choices:
            hint = nearest(name, choices) or f": there are {', '.join(choices)}"
            raise UserError(f'{flag}: "{name}" is not known{hint}')
    return names


# -- images --------------------------------------------------------------------------------------


def find_pictures(options, network, accelerator) -> list[Picture]:
    """The images to explain, from --images or the run's data set; the same on all processes.

    options: PictureOptions.
    """
    say = accelerator.print
    if options.images:
        files = find_files(options.images, "--images ")[: options.max_images]
        depth = network.run and network.run.recipes[0].get("bit_depth")
        pictures = [
            _file_picture(file, network.preprocessing, depth, options.skip_bad, say)
            for file in files
        ]
        pictures = [picture for picture in pictures if picture]
        if not pictures:
            raise UserError("none of the images could be read")
        return _numbered(pictures, network, accelerator)
    if not network.run:
        raise UserError("--model needs --images: there is no run that names its data set")
    flags = data_flags(
        network.run.recipes[0], dataset=options.dataset, image_column=options.image_column,
        label_column=options.label_column,
    )  # fmt: skip
    data = from_local_main(accelerator, lambda: load_data(**flags))
    check_classes(network.run, data.classes, data.source)
    role = options.split or ("val" if data.val is not None else "test")
    split = getattr(data, role)
    if split is None:
        raise UserError(f"{data.source} has no split '{role}' for this run: give another --split")
    region_column = options.region_column
    if region_column and region_column not in split.dataset.features:
        raise UserError(
            f"--region_column {region_column}: there is no such column"
            f"{nearest(region_column, split.dataset.features)}"
        )
    numbers = options.indices
    if numbers and max(numbers) >= len(split):
        raise UserError(f"--indices {max(numbers)}: split '{role}' has {len(split):,} images")

    def picture(k):
        return _row_picture(
            split, int(k), role, data.image_column, options, network.preprocessing, say
        )

    if not numbers:  # one process chooses: devices may differ where two classes are close
        numbers = from_main(
            accelerator,
            lambda: _right_and_wrong(options, network, accelerator.device, len(split), picture),
        )
    pictures = [image for image in map(picture, numbers) if image]
    if not pictures:
        kind = f"is {options.only}" if options.only else "could be read"
        raise UserError(f"no image of split '{role}' {kind}")
    return _numbered(pictures, network, accelerator)


def _numbered(pictures, network, accelerator):
    """The pictures with their numbers, once they and the weights are the same on all machines."""
    names = [[Path(picture.source).name, picture.true] for picture in pictures]
    check_same(accelerator, {"weights": network.run and network.run.sha256, "images": names})
    return [picture._replace(number=number) for number, picture in enumerate(pictures)]


def _file_picture(file, preprocessing, bit_depth, skip_bad, say):
    try:
        pixels = evaluation_image(file, preprocessing, bit_depth)
        return Picture(_view_pixels(pixels, preprocessing), str(file), None, None)
    except Exception as error:  # Pillow's readers raise a dozen types for a bad file
        return _report_unreadable(file, error, skip_bad, say)


def _report_unreadable(source, error, skip_bad, say):
    reason = reason_of_image(error)
    if not skip_bad:
        raise UserError(f"cannot read {source}: {reason} (--skip_bad leaves it out)") from None
    say(f"left out     {source}: {reason}")


def _view_pixels(pixels, preprocessing):
    """The centre that the network sees, as in evaluation."""
    (view,) = tta_views("none", preprocessing.size)
    return view.apply(pixels.unsqueeze(0), torch.zeros(1, dtype=torch.int64))[0].contiguous()


def _row_picture(split, k, role, column, options, preprocessing, say):
    row = split.dataset[int(split.rows[k])] if options.region_column else None
    columns = split.dataset.select_columns(column).with_format("arrow")
    cell = columns[int(split.rows[k]) : int(split.rows[k]) + 1][column].to_pylist()[0]
    source = f"{role} {k}"
    try:
        pixels = evaluation_image(image_file(cell), preprocessing, split.bit_depth)
        pixels = _view_pixels(pixels, preprocessing)
        region = None
        if row is not None:
            region = _region(row[options.region_column], row[column].size, preprocessing)
    except UserError:
        raise
    except Exception as error:
        return _report_unreadable(f"image {k} of split '{role}'", error, options.skip_bad, say)
    return Picture(pixels, source, int(split.labels[k]), region)


def _region(value, size, preprocessing):
    """A box or a mask of the whole image as a mask (S, S) of what the network sees, or None."""
    if value is None:
        return None
    if isinstance(value, Image.Image):
        mask = value.convert("L").point(lambda v: 255 if v else 0)
    elif np.shape(value) == (4,):
        x0, y0, x1, y1 = value
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), 255)
    else:
        raise UserError(f"--region_column holds neither a box nor a mask: {str(value)[:60]}")
    file = io.BytesIO()
    mask.save(file, "PNG")
    file.seek(0)
    return _view_pixels(evaluation_image(file, preprocessing), preprocessing)[0] > 127


@torch.inference_mode()
def _right_and_wrong(options, network, device, total, picture):
    """Numbers of images in a seeded order: half right and half wrong where possible, or one kind.

    total: images of the split. picture: a number -> Picture, or None for an unreadable image.
    """
    number = min(options.max_images or SHOWN, total)
    kinds = (options.only,) if options.only in ("right", "wrong") else ("right", "wrong")
    share = -(-number // len(kinds))
    numbers = {kind: [] for kind in kinds}
    order = torch.randperm(total, generator=generator(options.seed, "cams")).tolist()
    for start in range(0, total, PREDICTED):
        batch = [(k, picture(k)) for k in order[start : start + PREDICTED]]
        batch = [(k, image) for k, image in batch if image]
        probabilities = predict(network, [image for _, image in batch], device)
        for (k, image), label in zip(batch, probabilities.argmax(1).tolist(), strict=True):
            kind = "right" if label == image.true else "wrong"
            if kind in numbers:
                numbers[kind].append(k)
        if all(len(chosen) >= share for chosen in numbers.values()):
            break
    if len(kinds) == 1:
        return numbers[kinds[0]][:number]
    wrong_numbers = numbers["wrong"][: max(number // 2, number - len(numbers["right"]))]
    return numbers["right"][: number - len(wrong_numbers)] + wrong_numbers


def to_input(network, pictures, device):
    """The normalised batch (n, 3, S, S) of some pictures."""
    pixels = torch.stack([picture.pixels for picture in pictures]).to(device)
    return normalize_batch(pixels, network.preprocessing.mean, network.preprocessing.std)


def predict(network, pictures, device):
    """Probabilities (n, classes), float32 on the CPU."""
    if not pictures:
        return torch.zeros(0, len(network.classes))
    with torch.no_grad():
        logits = network.model(to_input(network, pictures, device)).float()
    if not logits.isfinite().all():
        raise UserError(f"{network.name} gives logits that are not finite: its weights are damaged")
    return (logits / network.temperature).softmax(1).cpu()


# -- maps ----------------------------------------------------------------------------------------


def targets_of(options, network, pictures):
    """A function (probabilities (n, classes), pictures) -> the classes to explain (n, k), int64.

    options: MapOptions. Raises UserError for a name that is not a class, and for the true class of
    images without labels.
    """
    classes, target = network.classes, options.target
    has_labels = all(picture.true is not None for picture in pictures)
    if (options.contrast or target == "true") and not has_labels:
        raise UserError(
            "the true class of these images is not known: --target predicted, or a name"
        )

    def true(batch):
        return torch.tensor([picture.true for picture in batch]).unsqueeze(1)

    if options.all_classes:
        return lambda probabilities, batch: torch.arange(len(classes)).repeat(len(probabilities), 1)
    if options.contrast:
        return lambda probabilities, batch: torch.cat(
            [true(batch), probabilities.argmax(1, keepdim=True)], dim=1
        )
    if target == "predicted":
        return lambda probabilities, batch: probabilities.argmax(1, keepdim=True)
    if target == "true":
        return lambda probabilities, batch: true(batch)
    if target in classes:
        number = classes.index(target)
    elif re.fullmatch(r"\d+", target) and int(target) < len(classes):
        number = int(target)
    else:
        hint = None if target.isdecimal() else nearest(target, classes)
        hint = hint or f" (numbers are 0 to {len(classes) - 1})"
        raise UserError(f'--target: no class is called "{target}"{hint}')
    return lambda probabilities, batch: torch.full((len(probabilities), 1), number)


class Explained(NamedTuple):
    """Maps of some pictures by every method, and how they were made."""

    layer: str
    probabilities: torch.Tensor  # float32 (n, classes)
    classes: torch.Tensor  # int64 (n, k)
    maps: dict  # method -> float32 (n, k, h, w), as the method gives them
    checks: list  # of each picture a dict


def explain(options, network, pictures, choose_targets, methods, device, bar):
    """Explained of the pictures of one process; None where it has no pictures.

    options: MapOptions. Raises UserError for a name that is not a layer, and for a network whose
    layers have no positions.
    """
    if not pictures:
        return None
    random, batches = None, []
    try:
        layer = options.layer or find_layer(network.model, to_input(network, pictures[:1], device))
        with GradCam(network.model, layer) as cam:
            for start in range(0, len(pictures), BATCH):
                batch = pictures[start : start + BATCH]
                images = to_input(network, batch, device)
                probabilities = predict(network, batch, device)
                classes = choose_targets(probabilities, batch)
                cams = cam(images, classes.to(device), methods)
                maps = {method: tensor.cpu() for method, tensor in cams.maps.items()}
                checks = [{} for _ in batch]
                if options.check:
                    random = random or reinitialized_copy(
                        network.model, generator(options.seed, "randomised")
                    )
                    targets = probabilities.argmax(1) if options.all_classes else classes[:, 0]
                    column = (classes == targets.unsqueeze(1)).int().argmax(1)
                    target_maps = {m: maps[m][torch.arange(len(batch)), column] for m in methods}
                    checks = check(
                        options.seed, network, cam, random, batch, images, targets, target_maps
                    )
                batches.append((probabilities, classes, maps, checks))
                bar.update(len(batch))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{network.name}: {error}") from None
    probabilities, classes, maps, checks = zip(*batches, strict=True)
    return Explained(
        layer, torch.cat(probabilities), torch.cat(classes),
        {method: torch.cat([batch[method] for batch in maps]) for method in methods},
        [values for batch in checks for values in batch],
    )  # fmt: skip


def heat_of(maps, size):
    """Maps (..., h, w) -> heat in [0, 1] (..., size, size); evidence against a class is 0."""
    return upsample_maps(normalize_maps(maps.relu()), (size, size))


def check(seed, network, cam, random, pictures, images, classes, maps):
    """What --check measures of one class of each picture: a dict {method: values} for each.

    AUC of deletion (low is good) and insertion (high is good), of the map and of a random one; the
    rank correlation with the map of a network with random weights (near 0 is good); the share of
    heat in the region, and the region's share of the image.
    """
    classes, device = classes.to(images.device), images.device
    size = network.preprocessing.size

    def score(masked):
        return network.model(masked).softmax(1).gather(1, classes.unsqueeze(1)).squeeze(1)

    def areas(heat):
        curves = deletion_insertion(score, images, heat.to(device), steps=min(STEPS, size * size))
        return curves.deletion_auc.tolist(), curves.insertion_auc.tolist()

    noise = [
        torch.rand(size, size, generator=generator(seed, "noise", picture.number))
        for picture in pictures
    ]
    noise_areas = areas(torch.stack(noise))
    methods = list(maps)
    with GradCam(random, cam.layer) as random_cam:
        random_maps = random_cam(images, classes, methods).maps
    checks = [{} for _ in pictures]
    for method in methods:
        heat = heat_of(maps[method], size)
        map_areas = areas(heat)
        correlations = rank_correlation(maps[method], random_maps[method].cpu()).tolist()
        for k, picture in enumerate(pictures):
            checks[k][method] = {
                "deletion": map_areas[0][k],
                "deletion_random": noise_areas[0][k],
                "insertion": map_areas[1][k],
                "insertion_random": noise_areas[1][k],
                "randomised": correlations[k] if correlations[k] == correlations[k] else None,
            }
            if picture.region is not None:
                share = heat_in_mask(heat[k : k + 1], picture.region.unsqueeze(0)).item()
                area = picture.region.double().mean().item()
                checks[k][method] |= {"heat_in_region": share, "region": area}
    return checks


def merge(shares, number):
    """The Explained of all pictures. shares: of each process, which has every nth picture."""
    shares = [share for share in shares if share]
    processes = len(shares)
    order = [k for rank in range(processes) for k in range(rank, number, processes)]
    index = torch.tensor(order).argsort()
    checks = [values for share in shares for values in share.checks]
    return Explained(
        shares[0].layer,
        torch.cat([share.probabilities for share in shares])[index],
        torch.cat([share.classes for share in shares])[index],
        {m: torch.cat([share.maps[m] for share in shares])[index] for m in shares[0].maps},
        [checks[k] for k in index.tolist()],
    )
