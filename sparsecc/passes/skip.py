"""skip: what the spec asks to be skipped at run time.

    g = linear(x, [gate]);  u = linear(x, [up]);  y = linear(mul(silu(g), u), [down])
      -->  y = neurons(x, [gate, up, down], [None, None, None], None, "rows", "silu", "ratio(0.25)", "")
    y = block(x, cos, sin, mask)
      -->  idx, n = select(recency(x, mask), "ratio(0.7)");  y = scatter_tokens(x, idx, block(gather_tokens(x, idx), ...))
"""
from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsecc.errors import SpecError
from sparsecc.inputs import Inputs
from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.policy import Policy
from sparsecc.ir.program import Program, Region
from sparsecc.ir.route_ops import GATHER_KEPT, KEEP, SCATTER_KEPT
from sparsecc.ir.skip_ops import GATHER, NEURONS, RECENCY, REQUEST, SCATTER, SELECT
from sparsecc.merging import Merge
from sparsecc.names import Names
from sparsecc.passes.blocks import Block, find_blocks
from sparsecc.passes.context import Context
from sparsecc.passes.ffn import Ffn, find_ffns
from sparsecc.passes.inputs import input_linears, skip_inputs
from sparsecc.passes.merge import merge_blocks
from sparsecc.passes.pack import tokens_of
from sparsecc.passes.route import Routes, counter, padding
from sparsecc.passes.shorter import Shorter, is_table, renumbered
from sparsecc.skipping import Neurons, Tokens, level_of, matches
from sparsecc.spec import SparsitySpec

aten = torch.ops.aten


@dataclass(frozen=True)
class Skip:
    """The pass; see the file's docstring."""

    name: str = "skip"
    requires: tuple[str, ...] = ("linears",)
    ensures: tuple[str, ...] = ()

    def run(self, program: Program, context: Any = None) -> None:
        spec = context.spec if isinstance(context, Context) else SparsitySpec()
        if not spec.skips:
            return
        ffns, missed = find_ffns(program)
        tokens = [(glob, rule) for glob, rule in spec.skips if isinstance(rule, Tokens)]
        if ffns and all(_one_token(ffn) for ffn in ffns) and not any(rule.scale != "none" for _, rule in tokens):
            context.notes += ["sequences of one token are run in full: a router keeps the first and the last one"] * bool(tokens)
            tokens = []
        blocks, loose = find_blocks(program, ffns) if tokens else ([], [])
        context.notes += [f"no feed-forward block: {line}" for line in missed] + [f"no block: {line}" for line in loose]
        chosen = _blocks(program, tokens, blocks, loose + missed)
        rules = [(glob, rule) for glob, rule in spec.skips if isinstance(rule, Neurons)]
        picked = _ffns(program, rules, ffns, missed)
        few = input_linears(program, [(glob, rule) for glob, rule in spec.skips if isinstance(rule, Inputs)],
                            {view.node for ffn, _ in picked for view in ffn.linears})
        merges = [(glob, rule) for glob, rule in spec.skips if isinstance(rule, Merge)]
        if merges and tokens:
            raise SpecError(f"{merges[0][0]!r} merges tokens and {tokens[0][0]!r} skips them: a model does one or the other")
        merge_blocks(program, merges, ffns, nothing)
        like = value_of(blocks[0].x) if blocks else None
        cutter = Cutter(program, tokens_of(blocks[0].x) if blocks else 0, Shorter(like), Routes(program, blocks))
        for one in chosen:
            cutter.cut(*one)
        infer(program)
        for ffn, rule in picked:
            _replace_ffn(program, ffn, rule)
        for one in few:
            skip_inputs(program, *one)


def blocks_under(program: Program, glob: str) -> list[Block]:
    """The recognised blocks that a glob names, in program order."""
    blocks, _ = find_blocks(program, find_ffns(program)[0])
    return [block for block in blocks if matches(glob, block.names)]


def _one_token(ffn: Ffn) -> bool:
    value = value_of(ffn.x)
    size = value.shape[1] if isinstance(value, torch.Tensor) and value.ndim == 3 else None
    return isinstance(size, int) and size == 1


def _ffns(program: Program, rules: list[tuple[str, Neurons]], ffns: list[Ffn], missed: list[str]) -> list[tuple[Ffn, Neurons]]:
    """The rule of each block: that of the last glob that names it. Raises SpecError for a glob that names none."""
    for glob, _ in rules:
        if not any(matches(glob, ffn.names) for ffn in ffns):
            nothing(program, glob, "feed-forward block", [ffn.names[0] for ffn in ffns], missed)
    found = [(ffn, next((rule for glob, rule in reversed(rules) if matches(glob, ffn.names)), None)) for ffn in ffns]
    return [(ffn, rule) for ffn, rule in found if rule is not None]


def _blocks(
    program: Program, rules: list[tuple[str, Tokens]], blocks: list[Block], missed: list[str]
) -> list[tuple[Block, Tokens, float | None, int]]:
    """Each block that a glob names, with the fraction that it skips and its place under the glob. Raises SpecError for a glob that names
    none, and for a schedule of another length than the blocks under its glob."""
    taken: dict[int, tuple[Tokens, float | None, int]] = {}
    for glob, rule in rules:
        under = [i for i, block in enumerate(blocks) if matches(glob, block.names)]
        if not under:
            nothing(program, glob, "block", [block.names[0] for block in blocks], missed)
        for at, i in enumerate(under):
            taken[i] = rule, rule.skipped(at, len(under)), at
    return [(blocks[i], *one) for i, one in sorted(taken.items()) if one[1] != 0]


def nothing(program: Program, glob: str, what: str, names: list[str], missed: list[str]) -> None:
    """Raises SpecError for a glob that names nothing; warns where the program is a part of a model that isn't known as a whole."""
    reasons = "".join(f"\n  {line}" for line in missed[:4])
    known = f"; recognised are {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "; none was recognised"
    message = f"{glob!r} names no {what} of this model{known}{reasons}"
    if not Names.found(program).partial:
        raise SpecError(message)
    warnings.warn(f"sparsecc: in this part of the model {message}", stacklevel=2)


def _replace_ffn(program: Program, ffn: Ffn, rule: Neurons) -> None:
    """One op for the block."""
    name, down = ffn.names[0], ffn.down.node
    level = level_of(rule.levels, name, ffn.width)
    graph = program.graph
    const = None if level is None else program.add_const(f"{name}_levels", level)
    weights, biases = [view.params[0] for view in ffn.linears], [view.bias for view in ffn.linears]
    names = tuple(program.weight_name(w) for w in weights)
    size = sum(program.const(w).nbytes for w in weights)
    with graph.inserting_before(down):
        if rule.score:
            kept = program.add_const(f"{name}_neurons", rule.set_of(name, ffn.width))
            args = (ffn.x, weights, biases, kept, "rows", ffn.activation, rule.score, "")
            new = graph.create_node("call_function", REQUEST, args, name="neurons")
        else:
            args = (ffn.x, weights, biases, const, "rows", ffn.activation, str(rule.policy), "")
            new = graph.create_node("call_function", NEURONS, args, name="neurons")
    program.replace(down, new)
    kept = rule.policy.size(ffn.width)
    more = {"shape": (ffn.width, ffn.gate.shape[1]), "m": tokens_of(ffn.x), "dense_bytes": size}
    more |= {} if kept is None else {"expected_kept": kept / ffn.width}
    program.regions[new.name] = Region(name, names, str(rule), f"{ffn.activation} neurons, {len(weights)} linears in one op", more=more)


@dataclass
class Cutter:
    """Runs blocks on some of their tokens. Blocks that keep as many share their indices, and what was gathered by them."""

    program: Program
    tokens: int
    shorter: Shorter
    routes: Routes
    indices: dict[Any, tuple[fx.Node, fx.Node, fx.Node | None]] = field(default_factory=dict)
    gathered: dict[Any, fx.Node] = field(default_factory=dict)
    scattered: dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=dict)
    moved: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def cut(self, block: Block, rule: Tokens, fraction: float | None, at: int) -> None:
        """Gather before the block, scatter behind it. Blocks come in program order, each with its place under the rule's glob."""
        graph = self.program.graph
        source = self.moved.get(block.x, block.x)
        mask = padding(block)
        policy, p, more = rule.policy or Policy("ratio", round(1 - (fraction or 0.0), 6)), None, {}
        with graph.inserting_before(block.inside[0]):
            if rule.router == "static":
                idx, size, count = self._select((RECENCY, mask), source, policy)
            else:
                scores, p = self.routes.scores(block, source, mask, rule, fraction, at)
                if rule.by_scores:
                    idx, size, count, more["seen"] = self._keep(scores, policy, block.names[0])
                else:
                    idx, size, count = self._select(scores, source, policy)
            gather = GATHER if count is None else GATHER_KEPT
            swapped = {source: self._take(source, idx, (1,), gather), **dict.fromkeys(block.sizes, size)}
            tables = self._renumbered(size) if rule.positions == "compact" else idx
        for node, dims in block.tokens.items():
            with graph.inserting_before(next(inner for inner in block.inside if node in inner.all_input_nodes)):
                swapped[node] = self._take(node, tables if is_table(node, dims) else idx, dims, gather)
        self.shorter.move(block.inside, swapped, idx)
        y = block.y if p is None or rule.scale == "none" else self.routes.scale(block, rule, p, idx, swapped[source])
        if count is not None:
            self.routes.hide(block, idx)
        self.routes.cuts[block.y] = idx, count
        users = list(y.users)
        base, same, _ = self.scattered.get(source, (source, None, None))
        base = base if same is idx else source
        with graph.inserting_after(y):
            out = graph.call_function(SCATTER if count is None else SCATTER_KEPT, (base, idx, y))
        for user in users:
            user.replace_input_with(y, out)
        self.scattered[out], self.moved[block.y] = (base, idx, y), out
        expected = 1 - fraction if fraction is not None else policy.value if policy.name == "ratio" and not rule.by_scores else None
        more |= {"m": self.tokens} | ({} if expected is None else {"expected_kept": expected})
        what = f"skips {fraction:.0%} of tokens" if fraction is not None else f"tokens by {policy}"
        self.program.regions[out.name] = Region(block.names[0], (), what, f"{rule}: skipped tokens are no keys in it", more=more)

    def _renumbered(self, count: fx.Node) -> fx.Node:
        """0, 1, 2, ... as indices [1, K]."""
        if count not in self.gathered:
            self.gathered[count] = renumbered(self.program.graph, count)
        return self.gathered[count]

    def _take(self, node: fx.Node, idx: fx.Node, dims: tuple[int, ...], gather: Any) -> fx.Node:
        """The kept rows of a value. Those of a value that the same indices were scattered into are what was scattered."""
        if node in self.scattered and self.scattered[node][1] is idx and dims == (1,):
            return self.scattered[node][2]
        key = (node, idx, dims)
        if key not in self.gathered:
            self.gathered[key] = self.program.graph.call_function(gather, (node, idx, list(dims)))
        return self.gathered[key]

    def _select(self, by: Any, source: fx.Node, policy: Policy) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """(indices, their number, None): scores, or what they are computed by, and a policy that keeps a fixed number of them."""
        key = (by, str(policy))
        if key not in self.indices:
            call = self.program.graph.call_function
            scores = by if isinstance(by, fx.Node) else call(by[0], (source, by[1]))
            idx = call(operator.getitem, (call(SELECT, (scores, str(policy))), 0))
            idx.meta["val"] = self._example(policy)
            self.indices[key] = idx, call(aten.sym_size.int, (idx, 1)), None
        return self.indices[key]

    def _keep(self, scores: fx.Node, policy: Policy, name: str) -> tuple[fx.Node, fx.Node, fx.Node, Any]:
        """(indices, their number, how many of them each row has, what counts them)"""
        call = self.program.graph.call_function
        key, seen = counter(name)
        chosen = call(KEEP, (scores, str(policy), key))
        idx, count = (call(operator.getitem, (chosen, i)) for i in range(2))
        idx.meta["val"] = self._example(policy)
        like = self.shorter.like
        with like.fake_mode:
            count.meta["val"] = torch.empty(like.shape[:1], dtype=torch.int32)
        chosen.meta["val"] = (idx.meta["val"], count.meta["val"])
        self.indices[scores, key] = idx, (size := call(aten.sym_size.int, (idx, 1))), count
        return idx, size, count, seen

    def _example(self, policy: Policy) -> Any:
        tokens = int(self.shorter.like.shape[1].node.hint or 128)
        return self.shorter.indices(f"kept_{len(self.indices)}", policy.size(tokens) or tokens // 2)
