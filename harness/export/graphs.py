"""One graph from pixels to probabilities: normalisation, network, temperature and softmax.

The input are uint8 RGB pixels (N, 3, S, S), resized and cropped; the output are probabilities,
float32 (N, classes). Resizing is not in the graph, since every runtime does it in another way:
harness.reports.card.how_to_prepare has it in ten lines of Pillow and numpy.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import logging
import os
import warnings

import torch
from torch import nn

from harness.errors import UserError, first_line

OPSET = 20
TOLERANCE = 1e-4  # of a probability, between the export and the run's network, both in fp32
MARGIN = 2e-4  # between the two likeliest classes: below it, either may come first


class Classifier(nn.Module):
    """The network of a run, from pixels to probabilities. model: in eval mode."""

    def __init__(self, model, mean, std, temperature, dtype=torch.float32):
        super().__init__()
        self.model = model.to(dtype)
        self.dtype, self.temperature = dtype, temperature
        factor = torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1)
        shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)

    def forward(self, pixels):
        normalised = pixels.float() * self.factor - self.shift
        logits = self.model(normalised.to(self.dtype)).float()
        return (logits / self.temperature).softmax(1)


def need(*packages):
    """Raise UserError with the pip command where one of the packages can't be imported."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(classifier, size, path, metadata):
    """Write the graph as ONNX, by torch's own exporter, for batches of any size.

    metadata: {name: text}, stored in the file. Raises UserError for a network that torch can't
    export.
    """
    import onnx

    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with _quietly():
        try:
            program = torch.onnx.export(
                classifier, (example,), dynamo=True, opset_version=OPSET,
                input_names=["pixels"], output_names=["probabilities"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}}, verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise UserError(f"this network can't be exported: {first_line(error)}") from error
    proto = program.model_proto
    for name, text in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = name, text
    onnx.save(proto, str(path))


def write_torch(classifier, size, path, metadata):
    """Write the graph by torch.export (.pt2), for batches of any size, with its metadata."""
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with _quietly():
        try:
            program = torch.export.export(
                classifier, (example,),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
            )  # fmt: skip
        except Exception as error:
            raise UserError(f"this network can't be exported: {first_line(error)}") from error
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})


def write_int8(fp32, path, batches):
    """Write an ONNX file quantised to int8 by onnxruntime, calibrated on batches of pixels."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {"pixels": batch.numpy()}

    prepared_file = path.with_name(f"{path.name}.prepared")
    try:
        with _quietly():
            quant_pre_process(str(fp32), str(prepared_file), skip_symbolic_shape=True)
            quantize_static(
                str(prepared_file), str(path), Reader(), quant_format=QuantFormat.QDQ,
                per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            )  # fmt: skip
    finally:
        prepared_file.unlink(missing_ok=True)


def run_onnx(path, batches):
    """Probabilities float32 (n, classes) of an ONNX file, on the CPU, for batches of pixels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"pixels": batch.numpy()})[0] for batch in batches]
    return torch.cat([torch.from_numpy(output) for output in outputs])


@torch.inference_mode()
def run_torch(path, batches):
    """The same of a .pt2 file."""
    with _quietly():
        module = torch.export.load(path).module()
    return torch.cat([module(batch) for batch in batches])


@torch.inference_mode()
def run_module(classifier, batches):
    """The same of the run's own network."""
    return torch.cat([classifier(batch) for batch in batches])


def differences(exported, reference):
    """(the largest difference of a probability, how many clear images change their class).

    Clear images: those whose two likeliest classes differ by more than MARGIN.
    """
    best = reference.topk(2, dim=1).values if reference.shape[1] > 1 else reference
    clear = best[:, 0] - best[:, -1] > MARGIN
    changed = (exported.argmax(1) != reference.argmax(1)) & clear
    return (exported - reference).abs().max().item(), int(changed.sum())


def metadata_of(run, temperature, sample, probabilities) -> dict:
    """The metadata in an exported file: {name: text}, as JSON where it is not plain text.

    sample: uint8 pixels (3, S, S) of one image. probabilities: of it, (classes,), in fp32.
    """
    from PIL import Image

    preprocessing, file = run.preprocessing, io.BytesIO()
    Image.fromarray(sample.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    steps = {
        "resize_shorter_side": preprocessing.stored_size,
        "interpolation": preprocessing.interpolation,
        "center_crop": preprocessing.size,
        "layout": "uint8 RGB (N, 3, H, W), not normalised",
    }
    return {
        "architecture": run.config["architecture"],
        "classes": json.dumps(run.classes),
        "preprocessing": json.dumps(steps),
        "temperature": repr(temperature),
        "weights_sha256": run.sha256,
        "sample_input_png_base64": base64.b64encode(file.getvalue()).decode(),
        "sample_output": json.dumps([round(p, 7) for p in probabilities.tolist()]),
    }  # fmt: skip


@contextlib.contextmanager
def _quietly():
    """Hide the exporters' messages, which are for their authors, while the block runs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
