"""Chains: kernels that follow each other without dense code between them become one call, `sparsecc::chain`.

The dense rest then sees one opaque op instead of dozens, and what a call costs on the host is paid once (see `record`).
"""

from __future__ import annotations

import hashlib
import itertools
import operator
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from sparsecc.codegen.tvm.tiles import SPAN
from sparsecc.ir import image_ops, ops, token_ops
from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import value_of
from sparsecc.ir.ops import KERNELS, LIBRARY, LINEAR, empty_output
from sparsecc.ir.program import Program, get_attr, make_module
from sparsecc.ir.token_ops import layout_of
from sparsecc.runtime.bands import Band, bands
from sparsecc.runtime.record import NotAView, Pool, Recorder, Replay
from sparsecc.runtime.varying import Batch, Caches

aten = torch.ops.aten
KINDS: dict[Any, Any] = {LINEAR: ops.linear, **token_ops.MEANINGS, **image_ops.IMAGE_MEANINGS}
"""Ops that kernels run, and what to call without the dispatcher."""
VIEWS = {
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.slice.Tensor,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.contiguous.default, operator.getitem,
}  # fmt: skip
PLANS = 32
"""Recorded shapes per thread and chain; more are forgotten, the oldest first."""

CHAINS: WeakValueDictionary[str, Chain] = WeakValueDictionary()
_COUNT = itertools.count()
_LOCAL = threading.local()


class Chain:
    """A graph of kernels and views, called with its tensors and the symbolic sizes that its views need.

    Sequences that do not know of each other (`batch`) go through all kernels a few at a time, so that what one kernel writes is still in
    cache when the next reads it.
    """

    def __init__(
        self, gm: fx.GraphModule, key: str, results: Sequence[Result] | None, batch: Batch | None, caches: Caches | None = None
    ) -> None:
        self.gm, self.key, self.results, self.batch, self.caches = gm, key, results, batch, caches
        CHAINS[key] = self

    def __call__(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if self.batch is None or (step := self.batch.step(tensors)) >= self.batch.size(tensors):
            return self.part(tensors, sizes)
        whole: list[Tensor] = []
        for first in range(0, self.batch.size(tensors), step):
            end = min(first + step, self.batch.size(tensors))
            into = [t[first:end] for t in whole]
            results = self.part(*self.batch.part(tensors, sizes, first, end), into)
            if not whole:
                whole = [_whole(t, self.batch.size(tensors)) for t in results]
                for t, result in zip(whole, results, strict=True):
                    t[:end] = result
        return whole

    def part(self, tensors: Sequence[Tensor], sizes: Sequence[int], into: Sequence[Tensor] = ()) -> list[Tensor]:
        """All kernels, by replay if these shapes were recorded; the results are written `into` tensors if such are given."""
        plans = _plans(self)
        length = self.caches.length(tensors) if self.caches is not None else 0
        key = _key(tensors, sizes, self.caches if length else None)
        plan = plans.get(key)
        if plan is not None:
            return plan(tensors, into, length)
        try:
            with Recorder(_pool(), spanned=True) as recorder:
                self._note(recorder, tensors, length)
                outputs = self.run(tensors, sizes, recorder)
        except NotAView:
            with Recorder(_pool()) as recorder:
                self._note(recorder, tensors, length)
                outputs = self.run(tensors, sizes, recorder)
        plan = Replay.of(recorder, tensors, outputs, self.kernels())
        if plan is not None:
            while len(plans) >= PLANS:
                plans.pop(next(iter(plans)))
            plans[key] = plan
        for t, output in zip(into, outputs, strict=False):
            t.copy_(output)
        return list(into) or outputs

    def _note(self, recorder: Recorder, tensors: Sequence[Tensor], length: int) -> None:
        if length and self.caches is not None:
            recorder.length = length
            recorder.grown = {tensors[i].untyped_storage().data_ptr(): 0 for i in self.caches.caches}

    def kernels(self) -> list[Any]:
        """What runs the nodes at present: another compilation may put its own in their place."""
        return [KERNELS.get(node.args[-1]) for node in self.gm.graph.nodes if node.target in KINDS]

    def run(self, tensors: Sequence[Tensor], sizes: Sequence[Any], recorder: Recorder | None = None) -> list[Tensor]:
        """Node by node."""
        return list(_Run(self.gm, recorder).run(*tensors, *sizes, enable_io_processing=False))


@dataclass(frozen=True)
class Result:
    """What a chain gives, without running it: sizes are integers or (tensor, dimension) of an argument."""

    dtype: torch.dtype
    layout: str
    sizes: tuple[int | tuple[int, int], ...]

    @staticmethod
    def of(node: fx.Node, tensors: Sequence[fx.Node]) -> Result | None:
        """None if a size is no argument's."""
        value, known = value_of(node), {}
        for t, tensor in enumerate(tensors):
            for d, size in enumerate(getattr(value_of(tensor), "shape", ())):
                known.setdefault(str(size), (t, d))
        sizes = [size if isinstance(size, int) else known.get(str(size)) for size in getattr(value, "shape", (None,))]
        layout = "row" if node.target is image_ops.POOL else layout_of(node.target, node.args)
        return None if None in sizes else Result(value.dtype, layout, tuple(sizes))  # type: ignore[arg-type]

    def fake(self, tensors: Sequence[Tensor]) -> Tensor:
        """Shape, dtype and strides."""
        shape = [size if isinstance(size, int) else tensors[size[0]].shape[size[1]] for size in self.sizes]
        like = tensors[0].new_empty((), dtype=self.dtype).expand(*shape[:-1], 1)
        return empty_output(like, shape[-1], self.layout)


class _Run(fx.Interpreter):
    """Calls implementations directly; on fake tensors, the ops themselves, with stand-ins for the weights."""

    def __init__(self, gm: fx.GraphModule, recorder: Recorder | None) -> None:
        super().__init__(gm)
        self.recorder, self.results = recorder, set(gm.graph.output_node().all_input_nodes)
        self.bands = {} if recorder is None else bands(gm.graph.nodes, self.results)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.bands:
            return self._run_band(self.bands[n])
        if self.recorder is not None:
            self.recorder.result = n in self.results
        return super().run_node(n)

    def _run_band(self, band: Band) -> None:
        """All of its kernels: their nodes count as run, and what only they read is let go."""
        if self.recorder is not None and self.recorder.spanned:
            raise NotAView("pictures lie in planes")
        nodes, last = [step.node for step in band.steps], band.steps[-1].node
        env = dict(self.env)
        for node in {i for n in nodes for i in n.all_input_nodes if i.op == "get_attr"}:
            env[node] = self.get_attr(node.target, (), {})
        value = band.run(env, self.recorder, last in self.results)
        for node in nodes:
            self.env[node] = None
            for gone in self.user_to_last_uses.get(node, ()):
                self.env.pop(gone, None)
                self.env[gone] = None
        self.env[last] = value

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.fake = any(isinstance(a, FakeTensor) for a in args)
        return super().run(*args, **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return (target if self.fake else KINDS.get(target, target))(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if self.fake else value


def _key(tensors: Sequence[Tensor], sizes: Sequence[int], caches: Caches | None) -> tuple[Any, ...]:
    """What decides how kernels are called: shapes, strides, alignment, what may be read behind the end, and which arguments share
    their place."""
    if caches is not None:
        rest = [t for i, t in enumerate(tensors) if i not in caches.caches and i not in caches.masks]
        return (*_key(rest, sizes, None), *caches.key(tensors))
    starts = [t.untyped_storage().data_ptr() for t in tensors]
    facts = ((t.dtype, t.shape, t.stride(), t.data_ptr() % 64, _slack(t), *_shared(t, tensors, starts)) for t in tensors)
    return (*sizes, *facts)


def _slack(t: Tensor) -> int:
    """Elements of the storage behind the tensor's last, as far as a kernel may care."""
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return int(min(t.untyped_storage().nbytes() // t.itemsize - last - 1, SPAN))


def _shared(t: Tensor, tensors: Sequence[Tensor], starts: Sequence[int]) -> tuple[int, int]:
    """The first argument on the same storage, and the distance from it."""
    same = starts.index(t.untyped_storage().data_ptr())
    return same, int(t.storage_offset()) - int(tensors[same].storage_offset())


def _whole(part: Tensor, batch: int) -> Tensor:
    """Memory for the results of all sequences, laid out as those of some."""
    return torch.empty(batch * part.stride(0), dtype=part.dtype).as_strided((batch, *part.shape[1:]), part.stride())


def _plans(chain: Chain) -> dict[Any, Replay]:
    """This thread's, forgotten with the chain."""
    by_chain = _LOCAL.__dict__.setdefault("plans", {})
    for key in [key for key in by_chain if key not in CHAINS]:
        del by_chain[key]
        if not by_chain:
            _LOCAL.pool = Pool()  # no recorded call is left that knows its addresses
    return by_chain.setdefault(chain.key, {})


def _pool() -> Pool:
    return _LOCAL.__dict__.setdefault("pool", Pool())


def _chain(tensors: list[Tensor], sizes: list[int], key: str) -> list[Tensor]:
    return CHAINS[key](tensors, sizes)


def _chain_fake(tensors: list[Tensor], sizes: list[int], key: str) -> list[Tensor]:
    chain = CHAINS[key]
    if chain.results is not None:  # running dozens of ops on symbolic sizes takes seconds
        return [result.fake(tensors) for result in chain.results]
    return chain.run(tensors, sizes)


LIBRARY.define(
    "chain(Tensor[] tensors, SymInt[] sizes, str key) -> Tensor[]", tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
)
LIBRARY.impl("chain", _chain, "CompositeExplicitAutograd")
torch.library.register_fake("sparsecc::chain", _chain_fake, lib=LIBRARY)
CHAIN = torch.ops.sparsecc.chain.default


def link(program: Program) -> list[Chain]:
    """Replace every group of at least two kernels by one call; returns the chains, which live as long as someone holds them."""
    graph = program.graph
    if any(mutates(node) for node in graph.nodes if node.op != "output"):
        return []  # groups move code, and writes must stay where they are
    _split_views(graph)
    level, ours = _levels(graph)
    groups: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in ours:
            groups[level[node]].append(node)
    groups = {key: nodes for key, nodes in groups.items() if sum(n.target in KINDS for n in nodes) > 1}
    if not groups:
        return []
    _sort(graph, level)
    made = [_link(program, nodes) for nodes in groups.values()]
    program.finish()
    return made


def _split_views(graph: fx.Graph) -> None:
    """A view of a kernel's result for each of its users, so that each can be on its user's side."""
    for node in reversed(list(graph.nodes)):
        if node.target in VIEWS and len(node.users) > 1:
            for user in list(node.users)[1:]:
                with graph.inserting_after(node):
                    twin = graph.node_copy(node)
                user.replace_input_with(node, twin)


def _levels(graph: fx.Graph) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """How often the way to a node changes between kernels and the dense rest, and which nodes are kernels' or views between them."""
    ours = {node for node in graph.nodes if node.target in KINDS and node.args[-1] in KERNELS}
    for node in reversed(list(graph.nodes)):
        if node.target in VIEWS and all(user in ours for user in node.users) and _of_kernel(node, ours):
            ours.add(node)
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        inputs = [i for i in node.all_input_nodes if i.op not in ("placeholder", "get_attr")]
        level[node] = max((level[i] + ((i in ours) != (node in ours)) for i in inputs), default=int(node in ours))
    return level, ours


def _of_kernel(node: fx.Node, ours: set[fx.Node]) -> bool:
    while node.target in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node in ours


def _sort(graph: fx.Graph, level: dict[fx.Node, int]) -> None:
    """Order by level: what depends on each other already stands so."""
    first = {"placeholder": -2, "get_attr": -1, "output": len(level) + 1}
    ordered = sorted(graph.nodes, key=lambda node: first.get(node.op, level[node]))
    for before, after in itertools.pairwise(ordered):
        before.append(after)


def _link(program: Program, nodes: list[fx.Node]) -> Chain:
    inside, graph = set(nodes), fx.Graph()
    outer = list(dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside))
    fixed = [i for i in outer if i.op == "get_attr"]
    sizes = [i for i in outer if isinstance(value_of(i), int | torch.SymInt)]
    tensors = [i for i in outer if i not in sizes and i not in fixed]
    values = {node: graph.placeholder(node.name) for node in (*tensors, *sizes)}
    for node, placeholder in values.items():
        placeholder.meta["val"] = value_of(node)
    values |= {node: graph.get_attr(str(node.target)) for node in fixed}
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    graph.output(tuple(values[node] for node in results))
    gm = make_module({str(node.target): get_attr(program.gm, str(node.target)) for node in fixed}, graph)
    text = hashlib.sha256("\n".join(n.format_node() or "" for n in graph.nodes).encode()).hexdigest()[:16]
    known = [Result.of(node, tensors) for node in results]
    caches = Caches.of(nodes, tensors)
    batch = Batch.of(nodes, tensors, sizes) if caches is None else None
    chain = Chain(gm, f"{next(_COUNT)}:{text}", None if None in known else known, batch, caches)  # type: ignore[arg-type]
    with program.graph.inserting_after(nodes[-1]):
        call = program.graph.call_function(CHAIN, (tensors, sizes, chain.key))
    for i, node in reversed(list(enumerate(results))):
        with program.graph.inserting_after(call):
            item = program.graph.call_function(operator.getitem, (call, i))
        node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    return chain
