"""bundle: the storage of feed-forward blocks that skip neurons, and where skipping stops to pay.

    y = neurons(x, [gate, up, down], ..., "rows", ...)  -->  y = neurons(x, [gate, bundle], ..., "bundle", ...)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsecc.ir.ops import KERNELS
from sparsecc.ir.program import Program
from sparsecc.ir.skip_ops import NEURONS, REQUEST
from sparsecc.passes.context import Context, NeuronTuner
from sparsecc.passes.pack import tokens_of


@dataclass(frozen=True)
class Bundle:
    """The pass; see the file's docstring. The tuner measures from which fraction of active neurons on dense code is faster."""

    name: str = "bundle"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        tuner: Any = context.tuner if isinstance(context, Context) else None
        if tuner is None or tuner.neurons is None:
            return
        for node in neuron_nodes(program):
            _pack(program, node, tuner.neurons)


def neuron_nodes(program: Program) -> list[fx.Node]:
    """The nodes of `sparsecc.neurons`, in program order."""
    return [node for node in program.graph.nodes if node.op == "call_function" and node.target in (NEURONS, REQUEST)]


def _pack(program: Program, node: fx.Node, tuner: NeuronTuner) -> None:
    x, weights, biases, level, storage, activation, policy, kernel = node.args
    if storage != "rows":
        return
    sources: Any = weights
    tensors = [program.const(w) for w in sources]
    gate = tensors[0] if len(tensors) > 1 else None
    region = program.regions[node.name]
    refused = tuner.refuses(tensors[-1])
    if refused is not None:
        region.reason = f"{region.reason}; {refused}"
        return
    policy = "all" if node.target is REQUEST else str(policy)
    stored = tuner.bundle(tensors[1] if len(tensors) == 3 else None, tensors[-1])
    chosen = tuner.choose(region.name, gate, stored, str(activation), policy, tokens_of(node.all_input_nodes[0]))
    region.reason = f"{region.reason}; {chosen.reason}"
    region.more |= chosen.figures | {"limit": chosen.limit, "seen": chosen.seen}
    if chosen.limit <= 0 and node.target is NEURONS:
        region.choice = "dense"
        return
    const = program.add_const(f"{sources[-1].target}_bundle", stored, program.weight_name(sources[-1]))
    extra = () if gate is None else tuner.sketch(gate, str(activation), policy)
    hint, name = f"{sources[0].target}_sketch", program.weight_name(sources[0])
    sketch = [program.add_const(hint, tensor, name) for tensor in extra]
    before = [] if gate is None else [sources[0]]
    node.args = (x, [*before, const, *sketch], biases, level, "bundle", activation, node.args[6], kernel)
    region.format, region.bytes = "bundle", sum(t.nbytes for t in (*tensors, *extra))
    region.choice = f"active {'inputs' if gate is None else 'neurons'} up to {chosen.limit:.0%}, dense beyond"


def lower_neurons(program: Program, context: Any) -> None:
    """Kernels by name, for `lower`."""
    tuner: Any = context.tuner if isinstance(context, Context) else None
    for node in neuron_nodes(program):
        more, request = program.regions[node.name].more, node.target is REQUEST
        if tuner is not None and tuner.neurons is not None and "limit" in more:
            policy = "all" if request else str(node.args[6])
            nodes: Any = node.args[1]
            weights, biases = [program.const(w) for w in nodes], node.args[2]
            limit, seen = more.get("limit", 1.0), more.get("seen")
            key, kernel = tuner.neurons.kernel(node.name, str(node.args[5]), policy, limit, seen, request, weights, biases)
            KERNELS[key] = kernel
            node.args = (*node.args[:-1], key)
