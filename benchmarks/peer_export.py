"""A pruned model written once, for every engine: the process that `benchmarks/cpu.py peers` runs before it loads them.

    python -m benchmarks.peer_export '{"model": "minilm", "pattern": "block(4, 1, 0.9)", "batch": 1, "seq": 128}' FOLDER

The masked dense model goes to model.onnx (static shapes) and model.pt, what it is given to inputs.npz and calibration.npz, and its
output in float64 to expected.npy. job.json adds the share of zeros and the floating-point operations that they leave.
"""
from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsecc
from examples import models

MODELS = {"minilm": models.minilm, "bert": models.bert_base}
OPSET = 13
"""Old enough for every engine."""
CALIBRATION = 32
"""Batches for engines that quantize activations ahead of time."""


class Encoder(nn.Module):
    """A BERT with positional arguments, and with the attention mask in the form of the classic exports, that engines recognize."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """f32 [batch, seq, hidden]."""
        masked = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
        return self.model(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=masked).last_hidden_state


def export(job: dict[str, Any], folder: Path) -> None:
    """Prune, and write everything to `folder`."""
    model = pruned(job)
    batch, seq = job["batch"], job["seq"]
    texts = models.minilm_inputs(batch * (1 + CALIBRATION), seq)
    inputs = {name: value[:batch] for name, value in texts.items()}
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in inputs.items()})
    np.savez(folder / "calibration.npz", **{n: v[batch:].reshape(CALIBRATION, batch, seq).numpy() for n, v in texts.items()})
    np.save(folder / "expected.npy", copy.deepcopy(model).double()(**inputs).last_hidden_state.numpy())
    torch.save(model, folder / "model.pt")
    (folder / "job.json").write_text(json.dumps(job | work(model, batch, seq)))
    # sdpa would be written with tests for NaN around it, which no engine fuses
    plain = MODELS[job["model"]](attn="eager")
    plain.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on shapes, which are static here; and of this exporter's age
        torch.onnx.export(
            Encoder(plain), tuple(inputs.values()), str(folder / "model.onnx"),
            input_names=list(inputs), output_names=["hidden"], opset_version=OPSET, dynamo=False,
        )


def pruned(job: dict[str, Any]) -> nn.Module:
    """By magnitude."""
    model = MODELS[job["model"]]()
    if job["pattern"] != "dense":
        sparsecc.prune(model, job["pattern"])
    return model


def work(model: Any, batch: int, seq: int) -> dict[str, Any]:
    """{"zeros": share of the linear weights, "flops": of a forward pass, linears by their nonzeros and attention's two products}."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    kept, held = (sum(int(count) for count in counts) for counts in ((w.count_nonzero() for w in weights), (w.numel() for w in weights)))
    attention = 4 * batch * seq * seq * model.config.hidden_size * model.config.num_hidden_layers
    return {"zeros": 1 - kept / held, "flops": 2 * batch * seq * kept + attention}


def main() -> None:
    """Export the job of the command line."""
    with torch.no_grad():
        export(json.loads(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
