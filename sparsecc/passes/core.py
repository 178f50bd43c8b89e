"""core: CoreMatching's core neurons and core tokens (Wang et al., ICML 2025), for what the spec calls `core_matching`.

A prompt: every feed-forward block writes its core neurons; behind block l the image tokens that share few of them leave the program.
    y = linear(mul(silu(g), u), [down])  -->  y, scores = core_prompt(x, [gate, up, down], ..., kept)
    later(h)                             -->  idx = shrink(core_tokens(scores, image)); later(gather_tokens(h, idx))
One token after it:
    y = linear(mul(silu(g), u), [down])  -->  y = request_neurons(x, [gate, up, down], ..., kept)
"""
from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsecc.cores import Cores
from sparsecc.errors import SpecError
from sparsecc.ir.core_ops import CORE_TOKENS, PROMPT, RELEASED, SHRINK, SPAN
from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.ops import KERNELS
from sparsecc.ir.program import Program, Region
from sparsecc.ir.skip_ops import GATHER, REQUEST
from sparsecc.passes.blocks import SUMS, entering, joined
from sparsecc.passes.context import Context
from sparsecc.passes.ffn import Ffn, find_ffns
from sparsecc.passes.grouped import group_queries
from sparsecc.passes.pack import tokens_of
from sparsecc.passes.release import release
from sparsecc.passes.shorter import Shorter, is_table, renumbered
from sparsecc.passes.skip import nothing
from sparsecc.skipping import matches

aten = torch.ops.aten
SCATTERS = (aten.masked_scatter.default, torch.masked_scatter, "masked_scatter")
EMBEDDINGS = (aten.embedding.default, torch.nn.functional.embedding)
VIEWS = (aten.unsqueeze.default, torch.unsqueeze, "unsqueeze")


@dataclass(frozen=True)
class Core:
    """The pass; see the file's docstring."""

    name: str = "core"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        rules = [] if not isinstance(context, Context) else [(g, rule) for g, rule in context.spec.skips if isinstance(rule, Cores)]
        if len(rules) > 1:
            raise SpecError("core_matching stands twice in the spec: one decides for a whole decoder")
        for glob, rule in rules:
            _match(program, glob, rule)


def _match(program: Program, glob: str, rule: Cores) -> None:
    ffns, missed = find_ffns(program)
    scatters = [node for node in program.graph.nodes if node.target in SCATTERS]
    behind = _after(program, scatters) if scatters else None
    decoder = [ffn for ffn in ffns if matches(glob, ffn.names) and (behind is None or ffn.x in behind)]
    if not decoder:
        nothing(program, glob, "feed-forward block of a decoder", [ffn.names[0] for ffn in ffns], missed)
        return
    sums = [_stream(ffn) for ffn in decoder]
    size = _sequence(program, decoder[0], sums[0])
    if size == 1:
        for ffn in decoder if not rule.compat else ():
            _replace(program, ffn, rule, None)
        group_queries(program)
        return infer(program)
    if isinstance(size, int):
        raise SpecError(f"core_matching: the prompt was captured as exactly {size} tokens: let their number vary, by dynamic_shapes, or "
                        "through methods/core_matching.py, which does")
    if rule.compat:
        first = sums[rule.layers[0]] if rule.layers[1] < len(decoder) else None
        image = _Cut(program, rule, first, size).image(scatters) if first is not None else None
        return release(program, rule, decoder, image)
    if rule.layer >= len(decoder):
        raise SpecError(f"core_matching(layer={rule.layer}): the decoder under {glob!r} has {len(decoder)} blocks, 0 to {len(decoder) - 1}")
    cut = sums[rule.layer]
    if cut is None:
        name = decoder[rule.layer].names[0]
        raise SpecError(f"core_matching(layer={rule.layer}): {name} adds nothing to a stream, where tokens would leave")
    made = [_replace(program, ffn, rule, i == rule.layer) for i, ffn in enumerate(decoder)]
    program.finish()
    infer(program)
    _Cut(program, rule, cut, size).run(decoder[rule.layer].names[0], made[rule.layer], scatters)
    infer(program)
    return None


def _stream(ffn: Ffn) -> fx.Node | None:
    """The residual sum that the block's result goes into, as [B, S, D]."""
    total = next(iter(ffn.down.node.users), None)
    known = total is not None and len(ffn.down.node.users) == 1 and total.target in SUMS
    return joined(total) if known and total is not None else None


def _sequence(program: Program, ffn: Ffn, total: fx.Node | None) -> Any:
    """The number of tokens of a sequence, an int or an expression. Raises SpecError."""
    value = value_of(total) if total is not None else None
    if not isinstance(value, torch.Tensor) or value.ndim != 3:
        raise SpecError(f"core_matching: {ffn.names[0]} adds to {None if total is None else program.type(total)}, not to a batch of "
                        "sequences [B, S, D]")
    size = value.shape[1]
    return size if isinstance(size, int) else size.node.expr


def _after(program: Program, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from them, they too."""
    found = set(sources)
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _replace(program: Program, ffn: Ffn, rule: Cores, scored: bool | None) -> fx.Node:
    """One op for the block: `request_neurons` where `scored` is None, else `core_prompt`."""
    name, down, call = ffn.names[0], ffn.down.node, program.graph.call_function
    weights, biases = [view.params[0] for view in ffn.linears], [view.bias for view in ffn.linears]
    names = tuple(program.weight_name(w) for w in weights)
    kept = program.add_const(f"{name}_core", rule.set_of(name, ffn.width))
    args = (ffn.x, weights, biases, kept, "rows", ffn.activation, rule.score)
    with program.graph.inserting_before(down):
        if scored is None:
            node = y = call(REQUEST, (*args, ""))
        else:
            node = call(PROMPT, (*args, scored, ""))
            y = call(operator.getitem, (node, 0))
    program.replace(down, y)
    size = sum(program.const(w).nbytes for w in weights)
    fraction = rule.size(ffn.width) / ffn.width
    more = {"shape": (ffn.width, ffn.gate.shape[1]), "m": tokens_of(ffn.x), "dense_bytes": size}
    what = f"{rule.size(ffn.width)} of {ffn.width} neurons"
    if scored is None:
        more["expected_kept"] = fraction
    else:
        what = f"chooses {what} for the tokens after the prompt"
    program.regions[node.name] = Region(name, names, str(rule), f"core neurons: {what}", more=more)
    return node


@dataclass
class _Cut:
    """Ends the way of tokens that are not kept. `stream`: block l's result [B, S, D], `size`: S."""

    program: Program
    rule: Cores
    stream: fx.Node
    size: Any

    def run(self, name: str, block: fx.Node, scatters: list[fx.Node]) -> None:
        """Everything behind the stream works on the kept tokens: values that enter it from elsewhere are cut by the same indices."""
        graph, order = self.program.graph, {node: i for i, node in enumerate(self.program.graph.nodes)}
        tail = self._tail(order)
        outer = {source for node in tail for source in node.all_input_nodes if source not in tail} - {self.stream}
        found = entering(outer, str(self.size))
        if isinstance(found, str):
            raise SpecError(f"core_matching: tokens cannot leave behind {name}: {found}; a prompt starts with an empty KV cache")
        tokens, sizes = found
        image = self.image(scatters)
        with graph.inserting_before(image.next):
            scores = graph.call_function(operator.getitem, (block, 1))
            both = graph.call_function(CORE_TOKENS, (scores, image, self.rule.tokens, ""))
            idx = graph.call_function(SHRINK, tuple(graph.call_function(operator.getitem, (both, i)) for i in range(2)))
            shorter, length = Shorter(value_of(self.stream)), value_of(self.stream).shape[1]  # type: ignore[union-attr]
            idx.meta["val"] = shorter.indices("core", int(length.node.hint or 128) // 2)
            count = graph.call_function(aten.sym_size.int, (idx, 1))
            places = renumbered(graph, count) if self.rule.positions == "compact" else idx
            rows = graph.call_function(GATHER, (self.stream, idx, [1]))
        swapped = {self.stream: rows, **dict.fromkeys(sizes, count)}
        for node, dims in tokens.items():
            with graph.inserting_before(next(inner for inner in sorted(tail, key=order.__getitem__) if node in inner.all_input_nodes)):
                swapped[node] = graph.call_function(GATHER, (node, places if is_table(node, dims) else idx, list(dims)))
        shorter.move(tail, swapped, idx)
        more = {"seen": self.rule.seen, "seen_in": "prompts", "m": tokens_of(self.stream)}
        self.program.regions[both.name] = Region(
            name, (), str(self.rule), f"core tokens: {self.rule.tokens} of the image's scores; others leave behind this block", more=more)

    def _tail(self, order: dict[fx.Node, int]) -> set[fx.Node]:
        """What is computed from the stream, and added dimensions of values that only it uses, such as each layer's own of rotary tables."""
        tail = _after(self.program, [self.stream]) - {self.stream, self.program.graph.output_node()}
        for node in sorted(order, key=order.__getitem__, reverse=True):
            late = order[node] > order[self.stream]
            if late and node.target in VIEWS and node not in tail and node.users and tail.issuperset(node.users):
                tail.add(node)
        return tail

    def image(self, scatters: list[fx.Node]) -> fx.Node:
        """bool[B, S], behind the stream: the tokens that may leave. Raises SpecError where the program doesn't say which they are."""
        with self.program.graph.inserting_before(self.stream.next):
            return self._image(scatters)

    def _image(self, scatters: list[fx.Node]) -> fx.Node:
        call, asked = self.program.graph.call_function, self.rule.candidates
        if isinstance(asked, tuple):
            return call(SPAN, (self.stream, *asked))
        if asked is not None:
            source = next((n for n in self.program.graph.nodes if n.target in EMBEDDINGS and self._is_ids(n.all_input_nodes)), None)
            if source is None:
                raise SpecError(f"core_matching(candidates={asked}): the program embeds no token ids [B, S]; give a span (start, end)")
            ids = next(n for n in source.all_input_nodes if self._is_ids([n]))
            return call(aten.eq.Scalar, (ids, asked))
        masks = [s.args[1] for s in scatters if isinstance(value := value_of(s), torch.Tensor) and self._dims(value, 3)]
        if len(masks) != 1 or not isinstance(masks[0], fx.Node):
            raise SpecError(f"core_matching: {len(masks)} masked_scatter put image features into the prompt, where one says which tokens "
                            "are an image's; give candidates=, a token id or a span (start, end)")
        return call(aten.select.int, (masks[0], -1, 0))

    def _is_ids(self, nodes: list[fx.Node]) -> bool:
        values = [value_of(n) for n in nodes]
        return any(isinstance(v, torch.Tensor) and not v.dtype.is_floating_point and self._dims(v, 2) for v in values)

    def _dims(self, value: torch.Tensor, ndim: int) -> bool:
        """Whether a value has so many dimensions, the second one being the sequence."""
        return value.ndim == ndim and isinstance(s := value.shape[1], torch.SymInt) and s.node.expr == self.size


def lower_cores(program: Program, context: Any) -> None:
    """Kernels by name, for `lower`."""
    tuner: Any = context.tuner if isinstance(context, Context) else None
    for node in program.graph.nodes:
        if node.target in (CORE_TOKENS, RELEASED):
            seen = program.regions[node.name].more["seen"]
            key, kernel = f"core tokens {id(seen):x}", seen
        elif node.target is PROMPT and tuner is not None and tuner.neurons is not None:
            key, kernel = tuner.neurons.counts()
        else:
            continue
        if kernel is not None:
            KERNELS[key] = kernel
            node.args = (*node.args[:-1], key)
