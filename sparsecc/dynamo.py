"""`torch.compile(model, backend="sparsecc", options={...})`: freezes the weights of a Dynamo graph, then compiles the program.

Dynamo hands over torch-level graphs whose weights are inputs, with symbolic sizes as further inputs. Weights become constants under
a guard: every call checks that they are the same tensors, unchanged since. A replaced weight recompiles; one that keeps changing
(a counter, a cache in a buffer) becomes an input again.
"""
from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import register_backend
from torch._dynamo.utils import counters

from sparsecc.aten import to_aten
from sparsecc.capture import share_tied
from sparsecc.errors import CaptureError
from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import infer
from sparsecc.ir.program import NOTES, Program, make_module
from sparsecc.names import Names

Compiled = Callable[..., Any]
CompileProgram = Callable[..., Compiled]

_MODULE_PART = re.compile(r"\[['\"]?([\w.\- ]+)['\"]?\]|\.(\w+)")
_PLUMBING = {"_modules", "_parameters", "_buffers", "_orig_mod"}


@register_backend(name="sparsecc")
def sparsecc_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """The Dynamo backend. Weights are only known for certain at the call, so compilation happens at the first one."""
    from sparsecc.compile import compile_program  # the pipeline imports capture, not the other way round

    partial = bool(counters["graph_break"])

    def compile(program: Program, inputs: Sequence[Any]) -> Compiled:
        Names(partial=partial).put(program)
        return compile_program(program, inputs, **(options or {}))

    return Frozen(gm, compile)


@dataclass(frozen=True)
class Frost:
    """One compilation: the positions of the inputs that stay inputs, and the weights (position, tensor, version) it relies on."""

    compiled: Compiled
    live: tuple[int, ...]
    weights: tuple[tuple[int, torch.Tensor, int], ...]

    def holds(self, inputs: Sequence[Any], only: tuple[int, ...] = ()) -> bool:
        """Whether the weights (or `only` those positions) are the same tensors, not written to since."""
        for i, tensor, version in self.weights:
            if (inputs[i] is not tensor or (version >= 0 and tensor._version != version)) and (not only or i in only):
                return False
        return True


class Frozen:
    """A Dynamo graph as a callable that keeps its weights as constants and watches them."""

    def __init__(self, gm: fx.GraphModule, compile_program: CompileProgram, known: Mapping[int, str] | None = None) -> None:
        """`known`: names by the id of a weight, where the model is at hand; else they are read from Dynamo's sources."""
        self.gm = gm
        self.known = known or {}
        self.compile_program = compile_program
        self.inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.names = weight_names(self.inputs)
        self.frozen = [i for i, node in enumerate(self.inputs) if is_weight(node) and not _written(node)]
        # Dynamo erases the sources and fakes of its graph after this call; later ones work on what is made of it now.
        self.graph, self.notes = _traced(gm)
        self.lock = threading.Lock()
        self.current: Frost | None = None

    def __call__(self, *inputs: Any) -> Any:
        frost = self.current
        if frost is None or not frost.holds(inputs):
            frost = self._freeze(inputs)
        return frost.compiled(*[inputs[i] for i in frost.live])

    def _freeze(self, inputs: Sequence[Any]) -> Frost:
        """Compile with the present weights; buffers written to in place since the last time stay inputs from now on."""
        with self.lock:
            if self.current is not None:
                if self.current.holds(inputs):
                    return self.current
                changed = {i for i, tensor, _ in self.current.weights if inputs[i] is tensor and not self.current.holds(inputs, (i,))}
                self.frozen = [i for i in self.frozen if i not in changed or isinstance(inputs[i], nn.Parameter)]
            weights = tuple((i, inputs[i], version_of(inputs[i])) for i in self.frozen)
            live = tuple(i for i in range(len(inputs)) if i not in set(self.frozen))
            compiled = self.compile_program(self.program(inputs), [inputs[i] for i in live])
            self.current = Frost(compiled, live, weights)
            return self.current

    def program(self, inputs: Sequence[Any]) -> Program:
        """The graph with the frozen inputs as constants. Raises CaptureError if it was traced in train mode."""
        _require_eval(self.gm)
        program = Program(_copy(self.graph), "capture")
        program.gm.meta[NOTES] = self.notes
        for i, node in enumerate(program.inputs):
            if i not in set(self.frozen):
                continue
            with program.graph.inserting_before(node):
                name = self.known.get(id(inputs[i]), self.names[i])
                const = program.add_const(name, inputs[i], name)
            program.replace(node, const)
        for node in program.graph.nodes:
            if node.op == "get_attr" and isinstance(tensor := program.const(node), torch.Tensor):
                program.origin.setdefault(str(node.target), self.known.get(id(tensor), str(node.target)))
        _flat_outputs(program)
        share_tied(program)
        program.finish()
        infer(program)
        return program


def _traced(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph in ATen where it can be had, and what to tell the user where not."""
    try:
        return to_aten(gm), ()
    except CaptureError as why:
        return _copy(gm), (f"only linears were looked at, since Dynamo's graph cannot be traced to ATen: {why}",)


def is_weight(node: fx.Node) -> bool:
    """Whether a placeholder is a module's parameter or buffer, by Dynamo's source of it."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return False
    name = _source(node)
    return isinstance(value, nn.Parameter) or "_parameters[" in name or "_buffers[" in name


def weight_names(nodes: Sequence[fx.Node]) -> list[str]:
    """`L['self']._modules['model']._parameters['weight']` -> `model.weight`, the qualified name in the user's model.

    Where the weights belong to several local variables, such as an encoder and a decoder, these come first."""
    paths = [[a or b for a, b in _MODULE_PART.findall(_source(node)[1:])] for node in nodes]
    several = len({path[0] for node, path in zip(nodes, paths, strict=True) if path and is_weight(node)}) > 1
    found = [path if several else path[1:] for path in paths]
    names = [".".join(part for part in path if part not in _PLUMBING) for path in found]
    return [name or node.name for name, node in zip(names, nodes, strict=True)]


def version_of(tensor: torch.Tensor) -> int:
    """The counter of in-place writes; inference tensors have none."""
    return -1 if tensor.is_inference() else tensor._version


def _source(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    return str(source.name() if callable(source.name) else source.name)


def _require_eval(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        place = 2 if "dropout" in name else 5 if name == "batch_norm" else None
        if place is not None and (node.args[place] if len(node.args) > place else node.kwargs.get("training")) is True:
            raise CaptureError(f"the model is in train mode ({name}): call model.eval() first, sparsecc compiles for inference")


def _written(node: fx.Node) -> bool:
    """Whether the graph writes to the input, directly or through a view made by a method."""
    return any(mutates(user) or (user.op == "call_method" and any(mutates(u) for u in user.users)) for user in node.users)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of our own; tensor attributes and submodules are shared."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    return make_module(gm, graph)


def _flat_outputs(program: Program) -> None:
    node = program.graph.output_node()
    if not isinstance(node.args[0], tuple):
        node.args = (tuple(node.args[0]) if isinstance(node.args[0], list) else (node.args[0],),)
