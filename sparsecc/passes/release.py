"""What the code that CoreMatching's authors released does, which is not what their paper says; for `core`, to compare with.

In some blocks of a prompt, computed in full, image tokens are ranked by how many positive activations they share with the fifth-last token,
not with core neurons; those up to the knee, the one at it too, lose their keys and values:
    keys  -->  masked_fill(keys, not core_released(a, image, -5), 0)                    as outputs of the program
A zero key still takes its part of the softmax, so this is no eviction, and saves nothing. Tokens after the prompt are computed in full.
"""
from __future__ import annotations

import torch
from torch import fx

from sparsecc.cores import Cores
from sparsecc.errors import SpecError
from sparsecc.ir.core_ops import RELEASED
from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program, Region
from sparsecc.passes.blocks import find_blocks
from sparsecc.passes.ffn import Ffn
from sparsecc.passes.pack import tokens_of
from sparsecc.passes.site import return_instead

aten = torch.ops.aten
REFERENCE = -5
"""The token that others are compared with: of the question, or of the template behind it."""


def release(program: Program, rule: Cores, decoder: list[Ffn], image: fx.Node | None) -> None:
    """`image`: bool[B, S], behind the first block that is changed. Raises SpecError for a decoder with fewer blocks, or without a cache."""
    first, last = rule.layers
    if image is None:
        raise SpecError(f"core_matching(layers={rule.layers}): the decoder has {len(decoder)} blocks, 0 to {len(decoder) - 1}")
    blocks, missed = find_blocks(program, decoder, cached=True)
    if missed or not all(block.cache for block in blocks):
        why = f" ({missed[0]})" if missed else ""
        raise SpecError(f"core_matching(compat='release') changes nothing but a KV cache: use methods/core_matching.py{why}")
    call = program.graph.call_function
    for block in blocks[first : last + 1]:
        behind = max(image, block.y, key=list(program.graph.nodes).index)
        with program.graph.inserting_before(behind.next):
            keep = call(RELEASED, (block.ffn.down.x, image, REFERENCE, ""))
            gone = call(aten.logical_not.default, (call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (keep, 1)), 3)),))
            zeroed = {node: call(aten.masked_fill.Scalar, (node, gone, 0.0)) for node in block.cache}
        for node, new in zeroed.items():
            return_instead(program, node, new)
        more = {"seen": rule.seen, "seen_in": "prompts", "m": tokens_of(block.x)}
        what = "keys and values of image tokens become zero in the cache, as in the authors' release"
        program.regions[keep.name] = Region(block.names[0], (), str(rule), what, more=more)
    infer(program)
