"""How each inference engine loads an exported model: the only file that knows their interfaces.

Every loader returns a call without arguments that gives the last hidden state, an array of [batch, seq, hidden]. Imports are inside
the loaders, since each runs in an interpreter that has that engine and need not have torch or sparsecc.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """What `peer_export` wrote: model.onnx, model.pt, inputs.npz, calibration.npz, expected.npy and job.json."""

    folder: Path
    threads: int

    @property
    def onnx(self) -> str:
        return str(self.folder / "model.onnx")

    def inputs(self) -> dict[str, Any]:
        """int64 [batch, seq] by name, in the order of the model's arguments."""
        import numpy as np

        with np.load(str(self.folder / "inputs.npz")) as stored:
            return dict(stored)

    def calibration(self) -> list[dict[str, Any]]:
        """Other text of the same shape, for engines that quantize activations ahead of time."""
        import numpy as np

        with np.load(str(self.folder / "calibration.npz")) as stored:
            names = stored.files
            return [dict(zip(names, rows, strict=True)) for rows in zip(*(stored[name] for name in names), strict=True)]

    def job(self) -> dict[str, Any]:
        return json.loads((self.folder / "job.json").read_text())


class Engine(NamedTuple):
    """peer: the name in --peer that brings it, or "" where sparsecc's own interpreter has it. precision: of weights and products.
    exact: whether outputs equal the masked dense model's to fp32 rounding, None where there is no output. packages: for versions."""

    peer: str
    precision: str
    exact: bool | None
    packages: tuple[str, ...]
    load: Callable[[Case], Call]


def sparsecc(case: Case) -> Call:
    """As a user calls it, with the pattern named."""
    import sparsecc as ours
    from benchmarks.cpu_models import sparsity_of

    model, inputs = _torch_model(case)
    compiled = ours.compile(model, sparsity=sparsity_of(case.job()["model"], case.job()["pattern"]))
    return lambda: compiled(**inputs).last_hidden_state


def torch_eager(case: Case, bf16: bool = False) -> Call:
    """Dense, kernel by kernel."""
    model, inputs = _torch_model(case)
    model = model.bfloat16() if bf16 else model
    return lambda: model(**inputs).last_hidden_state.float()


def torch_compile(case: Case, bf16: bool = False) -> Call:
    """Inductor in its freezing mode, the faster one: weights are constants, packed for oneDNN."""
    import torch._inductor.config as inductor
    from torch import _dynamo, compile

    model, inputs = _torch_model(case)
    model = model.bfloat16() if bf16 else model
    _dynamo.config.recompile_limit = 64  # one code object serves every model loaded here
    compiled = compile(model, options={"freezing": True})
    call = lambda: compiled(**inputs).last_hidden_state.float()  # noqa: E731
    with inductor.patch(freezing=True):  # Dynamo asks for it when it traces: the option alone comes too late
        call()
        call()
    return call


def onnxruntime(case: Case, file: str = "") -> Call:
    """All graph optimizations. Its threads sleep between the calls of others instead of spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file or case.onnx, options, providers=["CPUExecutionProvider"])
    inputs = case.inputs()
    return lambda: session.run(None, inputs)[0]


def onnxruntime_int8(case: Case) -> Call:
    """Dynamic quantization as its documentation does it: weights int8 per channel, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = str(case.folder / "dynamic-int8.onnx")
    if not Path(file).exists():
        quantize_dynamic(case.onnx, file, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    return onnxruntime(case, file)


def openvino(case: Case, precision: str = "f32", file: str = "") -> Call:
    """One stream, the latency hint."""
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    settings = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": False, **hints}
    request = core.compile_model(file or case.onnx, "CPU", settings).create_infer_request()
    inputs = case.inputs()
    return lambda: request.infer(inputs)[0]


def openvino_int8(case: Case) -> Call:
    """Post-training quantization by NNCF, calibrated on real text; what stays in floating point is bf16."""
    file = case.folder / "nncf-int8.xml"
    if not file.exists():
        import nncf
        import openvino as ov

        data = nncf.Dataset(case.calibration())
        model = ov.Core().read_model(case.onnx)
        ov.save_model(nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(case.calibration())), str(file))
    return openvino(case, "bf16", str(file))


def deepsparse(case: Case) -> Call:
    """Sparse, fp32."""
    import os

    os.environ["NM_DISABLE_ANALYTICS"] = "1"
    from deepsparse import compile_model

    inputs = case.inputs()
    engine = compile_model(case.onnx, batch_size=len(next(iter(inputs.values()))), num_cores=case.threads)
    arguments = [inputs[name] for name in engine.input_names]
    return lambda: engine.run(arguments)[0]


def floor(case: Case) -> Call:
    """No engine: the multiply-adds that the zeros leave, at the rate of registers alone. No fp32 code can be faster."""
    from benchmarks.limits import FmaLimit

    _one_pool(case)
    limit, flops = FmaLimit(case.threads), case.job()["flops"]
    return lambda: limit.run(flops)


ENGINES = {
    "sparsecc": Engine("", "fp32", True, ("torch", "apache-tvm"), sparsecc),
    "floor": Engine("", "fp32", None, (), floor),
    "torch eager": Engine("", "fp32", True, ("torch",), torch_eager),
    "torch eager bf16": Engine("", "bf16", False, ("torch",), lambda case: torch_eager(case, bf16=True)),
    "torch compile": Engine("", "fp32", True, ("torch",), torch_compile),
    "torch compile bf16": Engine("", "bf16", False, ("torch",), lambda case: torch_compile(case, bf16=True)),
    "onnxruntime": Engine("onnxruntime", "fp32", True, ("onnxruntime",), onnxruntime),
    "onnxruntime int8": Engine("onnxruntime", "int8", False, ("onnxruntime", "onnx"), onnxruntime_int8),
    "openvino": Engine("openvino", "fp32", True, ("openvino",), openvino),
    "openvino bf16": Engine("openvino", "bf16", False, ("openvino",), lambda case: openvino(case, "bf16")),
    "openvino int8": Engine("openvino", "int8", False, ("openvino", "nncf"), openvino_int8),
    "deepsparse": Engine("deepsparse", "fp32", True, ("deepsparse",), deepsparse),
}


def _torch_model(case: Case) -> tuple[Any, dict[str, Any]]:
    import torch

    _one_pool(case)
    model = torch.load(str(case.folder / "model.pt"), weights_only=False)
    return model, {name: torch.from_numpy(value) for name, value in case.inputs().items()}


def _one_pool(case: Case) -> None:
    import torch

    torch.set_grad_enabled(False)
    torch.set_num_threads(case.threads)
