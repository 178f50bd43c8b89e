"""skip: what the spec asks to be skipped at run time.

    g = linear(x, [gate]);  u = linear(x, [up]);  y = linear(mul(silu(g), u), [down])
      -->  y = neurons(x, [gate, up, down], [None, None, None], None, "rows", "silu", "ratio(0.25)", "")
    y = block(x, cos, sin, mask)
      -->  idx, n = select(recency(x, mask), "ratio(0.7)");  y = scatter_tokens(x, idx, block(gather_tokens(x, idx), ...))
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from sparsecc.errors import SpecError
from sparsecc.inputs import Inputs
from sparsecc.ir.infer import infer, value_of
from sparsecc.ir.program import Program, Region
from sparsecc.ir.skip_ops import NEURONS, REQUEST
from sparsecc.merging import Merge
from sparsecc.names import Names
from sparsecc.passes.after_prompt import after_prompt
from sparsecc.passes.blocks import Block, find_blocks
from sparsecc.passes.context import Context
from sparsecc.passes.cut import Cutter
from sparsecc.passes.ffn import Ffn, find_ffns
from sparsecc.passes.inputs import input_linears, skip_inputs
from sparsecc.passes.merge import merge_blocks
from sparsecc.passes.pack import tokens_of
from sparsecc.passes.route import Routes
from sparsecc.passes.shorter import Shorter
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
        single = bool(ffns) and all(_one_token(ffn) for ffn in ffns)
        cached = any(rule.cached for _, rule in tokens)
        if single and not cached and not any(rule.scale != "none" for _, rule in tokens):
            context.notes += ["sequences of one token are run in full: a router keeps the first and the last one"] * bool(tokens)
            tokens = []
        blocks, loose = find_blocks(program, ffns, cached) if tokens else ([], [])
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
        routes = Routes(program, blocks)
        if single and cached:
            after_prompt(program, routes, chosen)
            some = "past some blocks" if any(rule.decode == "routed" for _, rule, _, _ in chosen) else "through every block"
            context.notes.append(f"tokens after a prompt go {some}")
        else:
            cutter = Cutter(program, tokens_of(blocks[0].x) if blocks else 0, Shorter(like), routes)
            for block in chosen:
                cutter.cut(*block)
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
