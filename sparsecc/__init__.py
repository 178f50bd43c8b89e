"""sparsecc turns the sparsity of PyTorch models into speed."""

import sparsecc.dynamo  # noqa: F401  (registers the torch.compile backend)
from sparsecc import importers  # noqa: F401  (sparsecc.importers.load)
from sparsecc.compile import compile
from sparsecc.cores import Cores, core_matching
from sparsecc.errors import (
    CaptureError,
    CheckpointError,
    FormatError,
    PatternViolation,
    SelectionError,
    ShapeError,
    SparseccError,
    SpecError,
    TargetError,
    TextError,
    VerifyError,
)
from sparsecc.formats import ANY, block, channels, cols, heads, nm, rows, unstructured
from sparsecc.inputs import Inputs, inputs
from sparsecc.merging import Merge, merge
from sparsecc.prune import Coupled, PruneReport, flops, latency, prune, slicegpt
from sparsecc.runtime.module import CompiledModule
from sparsecc.skipping import Neurons, Tokens, ftp, mixture_of_depths, neurons
from sparsecc.spec import SparsitySpec, options

__version__ = "0.1.0"
__all__ = [
    "ANY", "CaptureError", "CheckpointError", "CompiledModule", "Cores", "Coupled", "FormatError", "Inputs", "Merge", "Neurons",
    "PatternViolation", "PruneReport", "SelectionError", "ShapeError", "SparseccError", "SparsitySpec", "SpecError", "TargetError",
    "TextError", "Tokens", "VerifyError", "block", "channels", "cols", "compile", "core_matching", "flops", "ftp", "heads", "inputs",
    "latency", "merge", "mixture_of_depths", "neurons", "nm", "options", "prune", "rows", "slicegpt", "unstructured",
]
