"""The vendors' sparse kernels through torch, as candidates in the same contest: cuSPARSELt and CUTLASS for 2:4, torch's own for blocks.

They keep a copy of the weight in their own order, beside the one in the program: what reads the program and its dumps finds the
documented format, at the price of the memory.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.config import tunable
from sparsecc.codegen.kernel import KernelSpec
from sparsecc.formats import Compressed, PackedNM
from sparsecc.ir.ops import ACTIVATIONS


@dataclass(frozen=True)
class VendorConfig:
    """library: who runs it; alg: cuSPARSELt's algorithm, whose default may be several times slower than its best."""

    library: str = tunable("cusparselt", "cutlass", "torch_bsr")
    alg: int = tunable(*range(16))


def vendors(spec: KernelSpec) -> list[VendorConfig]:
    """Those that can run the spec on this machine's GPU. For a single token none: they pad it to 8 or more."""
    if len(spec.formats) != 1 or spec.regime == "one" or spec.dtype not in ("f16", "bf16") or torch.version.hip:
        return []
    fmt = spec.formats[0]
    if isinstance(fmt.level, PackedNM) and (fmt.level.n, fmt.level.m) == (2, 4) and not (spec.ragged or spec.tail):
        found = [VendorConfig("cutlass")]
        if torch.backends.cusparselt.is_available():
            found += [VendorConfig("cusparselt", alg) for alg in range(8)]
        return found
    if isinstance(fmt.level, Compressed) and fmt.block[0] == fmt.block[1] >= 16 and not (spec.ragged or spec.tail):
        return [VendorConfig("torch_bsr")]
    return []


class VendorLinear:
    """fn(x [..., K], params, bias [N], residual [..., N]) -> y [..., N]; the weight is converted at the first call, once per weight."""

    def __init__(self, spec: KernelSpec, config: VendorConfig, shape: tuple[int, int]) -> None:
        self.spec, self.config, self.shape = spec, config, shape
        self._weights: dict[int, tuple[list[Tensor], Tensor]] = {}
        self._lock = threading.Lock()

    def prepare(self, tokens: int, dtype: torch.dtype | None = None) -> VendorLinear:
        """Nothing to compile."""
        return self

    def source(self, tokens: int) -> str:
        """What stands in the place of a kernel's text."""
        return f"# {self.spec}\n# torch.nn.functional.linear on a weight of {self.config.library}, algorithm {self.config.alg}\n"

    def __call__(self, x: Tensor, params: list[Tensor], bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = F.linear(x.reshape(-1, x.shape[-1]), self._weight(params), bias).reshape(*x.shape[:-1], self.shape[0])
        y = ACTIVATIONS[self.spec.epilogue].fn(y)
        return y.contiguous() if residual is None else y + residual

    def _weight(self, params: list[Tensor]) -> Tensor:
        with self._lock:
            found = self._weights.get(params[-1].data_ptr())
            if found is None:
                found = self._weights[params[-1].data_ptr()] = (params, self._convert(params))
            return found[1]

    def _convert(self, params: list[Tensor]) -> Tensor:
        fmt = self.spec.formats[0]
        arrays = {name: array.cpu() for name, array in zip(fmt.components(), params, strict=True)}
        dense = fmt.unpack(arrays, self.shape).to(params[-1].dtype).to(params[-1].device)
        if self.config.library == "torch_bsr":
            return dense.to_sparse_bsr(fmt.block)
        from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

        if self.config.library == "cutlass":
            return SparseSemiStructuredTensorCUTLASS.from_dense(dense)
        weight = SparseSemiStructuredTensorCUSPARSELT.from_dense(dense)
        weight.alg_id_cusparselt = self.config.alg  # an argument of from_dense only in newer releases
        return weight
