"""See what a network looks at: class activation maps of a trained run.

accelerate launch gradcam.py runs/x                                 16 images, right and wrong
accelerate launch gradcam.py runs/x --only wrong --contrast         true class against predicted
accelerate launch gradcam.py runs/x --split test --indices 3,14 --method gradcam,layercam
accelerate launch gradcam.py runs/x --images a.jpg folder/ 'photos/*.png' --target cat
accelerate launch gradcam.py runs/x --check                         can the maps be trusted?
accelerate launch gradcam.py --model resnet50 --weights default --images photo.jpg
"""

from harness.cli import flags


def read_flags(argv=None):
    parser = flags.Parser(__doc__)
    flags.cam_flags(parser)
    flags.running_flags(parser, precision=False, trains=False)  # maps are made in fp32
    flags.report_flags(parser, name="gradcam-RUN")
    return parser.read(argv)


if __name__ == "__main__":  # before torch is imported: --help and a mistyped flag answer at once
    args = read_flags()

import torch

from harness.ensembles.predictions import progress
from harness.explain import cams, report
from harness.explain.sheets import colours
from harness.launch import make_accelerator, script
from harness.processes import from_each, in_turn
from harness.training.folder import FolderOptions, claim_report, report_folder
from tricks.cam import CAM_METHODS


def main(args):
    accelerator, machine = make_accelerator("no", 1, args.threads, args.seed)
    rank, processes = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    torch.set_float32_matmul_precision("highest")  # maps are few: full fp32 on GPUs, too
    torch.backends.cudnn.allow_tf32 = False

    # network and images: whatever can be refused is refused before any long work
    methods = cams.parse_choices(args.method, CAM_METHODS, "--method")
    colour = colours(args.colormap)
    network_options = flags.pick(cams.NetworkOptions, args)
    picture_options = flags.pick(cams.PictureOptions, args)
    map_options = flags.pick(cams.MapOptions, args)
    cams.check_flags(network_options, picture_options, map_options)
    network = in_turn(accelerator, lambda: cams.find_network(network_options))
    folder_options = flags.pick(FolderOptions, args)
    folder = report_folder(folder_options, f"gradcam-{network.name}", "gradcam.py")
    network.model.to(device)
    pictures = cams.find_pictures(picture_options, network, accelerator)
    choose_targets = cams.targets_of(map_options, network, pictures)
    accelerator.print(report.plan(network, pictures, methods, machine))
    if args.dry_run:
        return

    # maps: a forward and a backward pass for 16 images at a time, shared out to the processes
    share = pictures[rank::processes]
    with progress(accelerator, len(share)) as bar:
        shares = from_each(
            accelerator,
            lambda: cams.explain(map_options, network, share, choose_targets, methods, device, bar),
        )
    explained = cams.merge(shares, len(pictures))

    # report
    if accelerator.is_main_process:
        claim_report(folder, "gradcam.py")
        of_data_set = bool(args.run) and not args.images and not args.dataset
        options = flags.pick(report.SheetOptions, args)
        report.write(
            options, accelerator, folder, network, pictures, explained, colour, of_data_set
        )  # fmt: skip


if __name__ == "__main__":
    with script("gradcam.py"):
        main(args)
