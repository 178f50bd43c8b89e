"""Program: an fx graph with flat inputs and outputs, its constants, and notes on its sparse regions."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from sparsecc.ir.effects import is_impure, mutates
from sparsecc.ir.ops import LINEAR, parse_terms, print_terms, split_params
from sparsecc.ir.types import TensorType

TYPE_KEY = "sparsecc_type"
"""The one meta key: a TensorType, or the text of another type ("sym[s0]"). Written by `infer` and `parse_program` only."""

Rule = Callable[["Program", fx.Node], fx.Node | None]


@dataclass
class Region:
    """What was decided for one linear, for people to read; nothing in the compiler depends on it."""

    name: str
    weights: tuple[str, ...] = ()
    pattern: str = ""
    reason: str = ""
    format: str = ""
    choice: str = ""
    bytes: int = 0
    times: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DimGroup:
    """What was decided for axes that are cut together, for people to read. `name`: the weights that make them; `readers`: that read them.

    size, dead and dropped count slices; `why` says what keeps those that are dead and not dropped.
    """

    name: str
    size: int
    dead: int
    dropped: int
    readers: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearView:
    """A sparsecc.linear node by field names: `view.terms`, `view.replace(epilogue="gelu")`."""

    node: fx.Node
    FIELDS: ClassVar[tuple[str, ...]] = ("x", "params", "bias", "residual", "terms", "epilogue", "layout", "kernel")

    def _arg(self, name: str) -> Any:
        return self.node.args[self.FIELDS.index(name)]

    @property
    def x(self) -> fx.Node:
        return self._arg("x")

    @property
    def params(self) -> list[fx.Node]:
        return list(self._arg("params"))

    @property
    def bias(self) -> fx.Node | None:
        return self._arg("bias")

    @property
    def residual(self) -> fx.Node | None:
        return self._arg("residual")

    @property
    def terms(self) -> tuple[TensorType, ...]:
        return parse_terms(self._arg("terms"))

    @property
    def epilogue(self) -> str:
        return self._arg("epilogue")

    @property
    def layout(self) -> str:
        return self._arg("layout")

    @property
    def kernel(self) -> str:
        return self._arg("kernel")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, cols = self.terms[0].shape
        return int(rows), int(cols)

    @property
    def term_params(self) -> list[list[fx.Node]]:
        """The nodes of `params` per term."""
        return split_params(self.terms, self.params)

    @property
    def plain(self) -> bool:
        """One dense-stored term and no kernel yet: what the graph passes may rewrite."""
        return len(self.terms) == 1 and self.terms[0].format is None and self.terms[0].rank is None and not self.kernel

    def replace(self, **fields: Any) -> LinearView:
        """Set fields in place; `terms` may be a tuple of TensorType or text. Raises TypeError on an unknown field."""
        if unknown := set(fields) - set(self.FIELDS):
            raise TypeError(f"sparsecc.linear has no field {sorted(unknown)}; it has {', '.join(self.FIELDS)}")
        if "terms" in fields and not isinstance(fields["terms"], str):
            fields["terms"] = print_terms(fields["terms"])
        values = dict(zip(self.FIELDS, self.node.args, strict=True)) | fields
        self.node.args = tuple(values[name] for name in self.FIELDS)
        return self


NOTES = "sparsecc_notes"
"""Key in a captured graph module's meta: what the user should hear of how it was captured."""


class Program:
    """The compiler's view of a model: placeholders and a tuple of outputs, both flat; weights as get_attr.

    `stage` names the pass that made it. `origin` maps a constant's attribute to the weight's name in the user's model.
    `regions` holds a Region per sparsecc.linear, and per convolution, by node name; `dims` the dimension groups in which slices are dead.
    """

    def __init__(self, gm: fx.GraphModule, stage: str = "capture", origin: Mapping[str, str] | None = None) -> None:
        self.gm = gm
        self.stage = stage
        self.origin: dict[str, str] = dict(origin or {})
        self.regions: dict[str, Region] = {}
        self.dims: list[DimGroup] = []
        self.symbols: dict[Any, Any] = {}  # torch's symbol -> the name that the program's text gave it

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders, in call order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What the output node returns: nodes, or plain Python values."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def const(self, node: fx.Node) -> torch.Tensor:
        """The tensor of a get_attr node."""
        return get_attr(self.gm, str(node.target))

    def is_const(self, node: Any) -> bool:
        """Whether the node is a tensor constant that nothing in the program writes to."""
        if not (isinstance(node, fx.Node) and node.op == "get_attr" and isinstance(self.const(node), torch.Tensor)):
            return False
        return not any(mutates(user) for user in node.users)

    def add_const(self, hint: str, tensor: torch.Tensor, origin: str | None = None) -> fx.Node:
        """A new buffer named after `hint`, and its get_attr node, placed with the other constants at the top of the graph."""
        name = base = re.sub(r"\W+", "_", hint).strip("_")
        count = 0
        while hasattr(self.gm, name):
            count += 1
            name = f"{base}_{count}"
        self.gm.register_buffer(name, tensor.detach())
        if origin is not None:
            self.origin[name] = origin
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        return node

    def weight_name(self, node: fx.Node) -> str:
        """The qualified name, in the user's model, of the tensor behind a get_attr node."""
        return self.origin.get(str(node.target), str(node.target))

    def type(self, node: Any) -> TensorType | None:
        """The inferred type; None for what isn't a tensor, or before `infer`."""
        found = node.meta.get(TYPE_KEY) if isinstance(node, fx.Node) else None
        return found if isinstance(found, TensorType) else None

    def linears(self) -> Iterator[LinearView]:
        """The sparsecc.linear nodes, in program order."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target is LINEAR:
                yield LinearView(node)

    def linear(
        self, x: fx.Node, params: Sequence[fx.Node], bias: fx.Node | None, terms: Sequence[TensorType] | str,
        residual: fx.Node | None = None, epilogue: str = "", layout: str = "row", kernel: str = "",
    ) -> LinearView:
        """A new sparsecc.linear at the graph's insert point."""
        text = terms if isinstance(terms, str) else print_terms(terms)
        args = (x, list(params), bias, residual, text, epilogue, layout, kernel)
        return LinearView(self.graph.create_node("call_function", LINEAR, args, name="linear"))

    def region(self, node: fx.Node) -> Region:
        """The notes on a sparsecc.linear; made on first use, named after its weights."""
        if node.name not in self.regions:
            weights = tuple(self.weight_name(p) for p in LinearView(node).params if p.op == "get_attr")
            self.regions[node.name] = Region(" + ".join(w.removesuffix(".weight") for w in weights) or node.name, weights)
        return self.regions[node.name]

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new`, carry over the value and source information that `new` lacks, and erase `old`."""
        inherit(new, old)
        old.replace_all_uses_with(new, propagate_meta=False)
        self.graph.erase_node(old)

    def rewrite(self, rules: Mapping[Any, Rule]) -> int:
        """Apply rules {target: fn(program, node)} in program order until nothing changes; returns how often one applied.

        A rule returns the node that takes over, the same node if it changed it in place, or None. New nodes go before the
        old one. Dead pure nodes are removed at the end.
        """
        applied, again = 0, True
        while again:
            again = False
            for node in list(self.graph.nodes):
                rule = rules.get(node.target) if node.op.startswith("call_") and not node._erased else None
                if rule is None:
                    continue
                with self.graph.inserting_before(node):
                    new = rule(self, node)
                if new is None:
                    continue
                applied, again = applied + 1, True
                if new is not node:
                    self.replace(node, new)
        self.finish()
        return applied

    def finish(self) -> None:
        """Remove dead code, check the graph's form, drop constants that nobody uses, and let the module regenerate its code."""
        self.graph.eliminate_dead_code(is_impure)
        self.graph.lint()
        live = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for name in [name for name in self.gm._buffers if name not in live]:
            del self.gm._buffers[name]
        names = {node.name for node in self.graph.nodes}
        self.regions = {name: region for name, region in self.regions.items() if name in names}
        self.gm.recompile()

    def run(self, *inputs: Any) -> tuple[Any, ...]:
        """Execute eagerly, node by node, without gradients."""
        with torch.no_grad():
            return tuple(fx.Interpreter(self.gm).run(*inputs, enable_io_processing=False))

    def clone(self) -> Program:
        """A copy that passes may change; constants are shared."""
        attrs = {str(n.target): get_attr(self.gm, str(n.target)) for n in self.graph.nodes if n.op == "get_attr"}
        modules = {str(n.target): self.gm.get_submodule(str(n.target)) for n in self.graph.nodes if n.op == "call_module"}
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        graph.output(output)
        gm = make_module({**attrs, **modules}, graph)
        gm.meta.update(self.gm.meta)
        copy = Program(gm, self.stage, self.origin)
        copy.symbols = dict(self.symbols)
        copy.dims = list(self.dims)
        renamed = {old.name: new.name for old, new in values.items()}
        for name, region in self.regions.items():
            copy.regions[renamed.get(name, name)] = Region(**(vars(region) | {
                "times": dict(region.times), "notes": list(region.notes), "more": dict(region.more)}))
        return copy


def make_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that writes its Python code when it is first called: passes never call it, so they need not pay for it."""
    return _LazyGraphModule(root, graph, "Program")


def inherit(new: fx.Node, old: fx.Node) -> None:
    """Copy the meta that `new` lacks: fake value, type, source line, module."""
    for key in ("val", "example_value", TYPE_KEY, "stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])


def get_attr(module: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or submodule at a dotted name. Raises AttributeError."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
