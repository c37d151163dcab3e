"""The code that train.py, finetune.py and the other scripts share; `load_run` is for your own."""


def load_run(folder):
    """The network of a run folder, its preprocessing, its classes: see harness.inference.program.

    model, preprocess, classes, temperature = load_run("runs/x")
    """
    from harness.inference import program  # here, as it imports torch

    return program.load_run(folder)
