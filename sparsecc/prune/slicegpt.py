"""SliceGPT: rotate the residual stream to its principal components and zero the small ones (Ashkboos et al., 2024).

Exact steps first. What a norm multiplies and adds is folded into the linears behind it; a layer norm also loses its mean, which is taken
out of everything that writes the stream, and becomes x / rms(x). Then every stream between two residual additions may have an orthogonal
basis Q of its own: W_read Q, Q^T W_write, and x Q_before^T Q_after on the way past a block. Last, all but the first d components of each
are zero.

Weights keep their size: zeros stand where the paper slices, and the norms divide by the original width, as the paper's do. (The released
code subtracts the embedding's mean in every model; it is right only for layer norms, so here RMS norms go without.)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsecc.errors import CaptureError, SpecError
from sparsecc.prune.calibrate import call, evaluating
from sparsecc.prune.flow import trace

TOLERANCE = 1e-3
"""Largest error of the rotated, unsliced model, relative to the largest output: float32 rounding through a deep model is well below."""


class RotatedBlock(nn.Module):
    """A pre-norm transformer block whose residual changes its basis: x Q_attn + attn(norm(x)), then x Q_mlp + mlp(norm(x)).

    Takes what the original block took, and passes to its parts what they take. The shortcuts are [D, D] buffers named as in the paper's
    checkpoints; norms and parts keep their names.
    """

    attn_shortcut_Q: Tensor
    mlp_shortcut_Q: Tensor

    def __init__(self, block: nn.Module, parts: Sequence[str], width: int) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.parts = tuple(parts)
        self.takes = tuple(inspect.signature(block.forward).parameters)
        self.accepts = {name: _accepted(self.get_submodule(name)) for name in parts[1::2]}
        weight = next(block.parameters())
        for shortcut in ("attn_shortcut_Q", "mlp_shortcut_Q"):
            self.register_buffer(shortcut, torch.eye(width, dtype=weight.dtype, device=weight.device))
        self.train(block.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = {**dict(zip(self.takes, args, strict=False)), **kwargs}
        x = given.pop(self.takes[0])
        for i, shortcut in ((0, self.attn_shortcut_Q), (2, self.mlp_shortcut_Q)):
            norm, part = (self.get_submodule(name) for name in self.parts[i : i + 2])
            accepted = self.accepts[self.parts[i + 1]]
            y = part(norm(x), **{k: v for k, v in given.items() if accepted is None or k in accepted})
            x = x @ shortcut + (y if isinstance(y, Tensor) else y[0])
        return x


def _accepted(part: nn.Module) -> tuple[str, ...] | None:
    """The keywords that a part takes beyond its input; None for any."""
    parameters = list(inspect.signature(part.forward).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters[1:] if p.kind is not p.VAR_POSITIONAL)


@dataclass(frozen=True)
class Stream:
    """Where a residual stream of `width` features is written and read: module names.

    Each block is (norm, part, norm, part); `reads` and `writes` map a part to its linears. `tables` are embeddings (or a first linear).
    """

    width: int
    tables: tuple[str, ...]
    blocks: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    reads: Mapping[str, tuple[str, ...]]
    writes: Mapping[str, tuple[str, ...]]
    norm: str
    heads: tuple[str, ...]


def slicegpt(model: nn.Module, sparsity: float, calibration: Iterable[Any], multiple: int = 8, layers: str | None = None) -> nn.Module:
    """A rotated copy of `model` whose residual stream holds zeros in at least the fraction `sparsity` of its components.

    Principal components are those of the dense model's signals over `calibration` (inputs as for `prune`), in float64. The kept width is
    rounded down to a `multiple`; the last stream, in front of the head, keeps all. `layers` names the ModuleList of blocks, the largest by
    default; a block must be norm, part, norm, part, each added to the stream. The model itself is not changed.
    Raises SpecError for another structure, and if the rotated model, before anything is zeroed, computes something else.
    """
    if not 0 <= sparsity < 1:
        raise SpecError(f"slicegpt needs a sparsity from 0 up to, not including, 1, got {sparsity}")
    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise SpecError("slicegpt needs calibration=, an iterable of model inputs; this one is empty")
    result = copy.deepcopy(model)
    stream = find_stream(result, first, layers)
    kept = int(stream.width * (1 - sparsity) + 1e-9)
    kept -= kept % multiple
    if kept < 1:
        raise SpecError(f"slicegpt: {sparsity} of {stream.width} components leaves no multiple of {multiple}: ask for less")
    with torch.no_grad(), evaluating(model):
        expected = _outputs(model, first)
        bases = _bases(result, stream, chain([first], batches))
        fold(result, stream)
        rotate(result, stream, bases)
        with evaluating(result):
            got = _outputs(result, first)
        worst = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(got, expected, strict=True))
        if not worst < TOLERANCE:
            raise SpecError(
                f"slicegpt: rotated, the model computes something else (relative error {worst:.1e}): something in it is not invariant, "
                "such as a norm of another kind, or a block that is more than norm, part, norm, part"
            )
        cut(result, stream, kept)
    return result


def find_stream(model: nn.Module, example: Any, layers: str | None = None) -> Stream:
    """The residual stream through the blocks of a ModuleList, by dataflow. Raises SpecError where there is none of this kind."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists or (layers is not None and layers not in lists):
        raise SpecError(f"slicegpt: layers={layers!r} names no ModuleList of blocks; the model has {', '.join(lists) or 'none'}")
    at = layers or max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    blocks = tuple(f"{at}.{i}" for i in range(len(lists[at])))
    try:
        flow = trace(model, example)
    except CaptureError as error:
        raise SpecError(f"slicegpt: the stream cannot be followed: {error}") from error
    classes = flow.channels.classes()
    children = tuple(_called(model, name, example) for name in blocks)
    parts = [f"{block}.{four[i]}" for block, four in zip(blocks, children, strict=True) for i in (1, 3)]
    first = f"{blocks[0]}.{children[0][0]}"
    uses = [(use.name.rpartition(".")[0], use.role, classes[use.ids.reshape(-1)]) for use in flow.uses if bool((use.ids >= 0).all())]
    axis = next((ids for module, _, ids in uses if module == first), None)
    if axis is None:
        raise SpecError(f"slicegpt: {first} has no weight, so it is not seen to read a stream")
    same = sorted({(module, role) for module, role, ids in uses if ids.shape == axis.shape and torch.equal(ids, axis)})
    reads, writes = (
        {part: tuple(m for m, r in same if r == role and m.startswith(f"{part}.")) for part in parts} for role in ("reads", "writes")
    )
    for part in parts:
        if not (reads[part] and writes[part]):
            raise SpecError(f"slicegpt: {part} does not read and write one residual stream with the embedding")
    outside = [(module, role) for module, role in same if not module.startswith(f"{at}.")]
    tables = tuple(m for m, r in outside if r == "writes")
    readers = {id(model.get_submodule(m).weight) for m, r in outside if r == "reads"}
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(f"{at}.")]
    heads = tuple(name for name, m in linears if id(m.weight) in readers)  # one may share the embedding's weight, under its name
    norms = [m for m, r in outside if r == "scales" and m not in tables]
    if len(norms) != 1 or not heads or not tables:
        raise SpecError(f"slicegpt: one norm and a head after the last block are needed, found {norms or 'none'} and {heads or 'none'}")
    return Stream(len(axis), tables, blocks, children, reads, writes, norms[0], heads)


def _called(model: nn.Module, block: str, example: Any) -> tuple[str, ...]:
    """The children of a block in the order in which they are called."""
    order: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda *_, n=name: order.append(n)) for name, m in model.get_submodule(block).named_children()]
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    order = [name for name in order if not isinstance(model.get_submodule(f"{block}.{name}"), nn.Dropout | nn.Identity)]
    if len(order) != 4 or any(sum(1 for _ in model.get_submodule(f"{block}.{name}").children()) for name in order[::2]):
        raise SpecError(f"slicegpt: {block} calls {', '.join(order) or 'nothing'}; a block must be norm, part, norm, part")
    return tuple(order)


def norms_of(stream: Stream) -> list[tuple[str, tuple[str, ...]]]:
    """Every norm with the linears that read it, in the order of the stream."""
    pairs = [(f"{b}.{p[i]}", stream.reads[f"{b}.{p[i + 1]}"]) for b, p in zip(stream.blocks, stream.parts, strict=True) for i in (0, 2)]
    return [*pairs, (stream.norm, stream.heads)]


def _bases(model: nn.Module, stream: Stream, batches: Iterable[Any]) -> list[Tensor]:
    """Principal components of what goes into each norm, largest first: float64 [D, D], one a column."""
    names = [name for name, _ in norms_of(stream)]
    moments = {name: torch.zeros(stream.width, stream.width, dtype=torch.float64) for name in names}
    centred = {name: isinstance(model.get_submodule(name), nn.LayerNorm) for name in names}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, stream.width).double()
            x = x - x.mean(1, keepdim=True) if centred[name] else x
            moments[name] += (x.t() @ x).cpu()

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        with evaluating(model):
            for inputs in batches:
                call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, moment in moments.items():
        if not moment.isfinite().all():
            raise SpecError(f"slicegpt: {name} saw NaN or infinite inputs during calibration")
    return [torch.linalg.eigh(moments[name]).eigenvectors.flip(1) for name in names]


def fold(model: nn.Module, stream: Stream) -> None:
    """Norms become x / rms(x): their weights and biases go into the linears behind them, their means out of what writes the stream."""
    _untie(model, stream)
    centred = isinstance(model.get_submodule(stream.norm), nn.LayerNorm)
    if centred:
        ones = torch.full((stream.width, stream.width), 1 / stream.width, dtype=torch.float64)
        _written(model, stream, [torch.eye(stream.width, dtype=torch.float64) - ones] * (2 * len(stream.blocks) + 1))
    for name, readers in norms_of(stream):
        norm: Any = model.get_submodule(name)
        for reader in readers:
            linear: Any = model.get_submodule(reader)
            if getattr(norm, "bias", None) is not None:
                extra = linear.weight.double() @ norm.bias.double()
                extra = extra if linear.bias is None else extra + linear.bias.double()
                linear.bias = nn.Parameter(extra.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
            if getattr(norm, "weight", None) is not None:
                linear.weight.copy_((linear.weight.double() * norm.weight.double()).to(linear.weight.dtype))
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        parent, _, last = name.rpartition(".")
        plain = nn.RMSNorm(stream.width, eps=eps, elementwise_affine=False)
        setattr(model.get_submodule(parent), last, plain.train(norm.training))


def rotate(model: nn.Module, stream: Stream, bases: Sequence[Tensor]) -> None:
    """Gives the stream in front of every norm the basis of its own, [D, D] orthogonal; blocks become RotatedBlocks."""
    _written(model, stream, [basis.t() for basis in bases])
    for basis, (_, readers) in zip(bases, norms_of(stream), strict=True):
        for reader in readers:
            weight: Any = model.get_submodule(reader).weight
            weight.copy_((weight.double() @ basis.to(weight.device)).to(weight.dtype))
    for i, (name, parts) in enumerate(zip(stream.blocks, stream.parts, strict=True)):
        parent, _, last = name.rpartition(".")
        block = RotatedBlock(model.get_submodule(name), parts, stream.width)
        block.attn_shortcut_Q.copy_(bases[2 * i].t() @ bases[2 * i + 1])
        block.mlp_shortcut_Q.copy_(bases[2 * i + 1].t() @ bases[2 * i + 2])
        setattr(model.get_submodule(parent), last, block)


def cut(model: nn.Module, stream: Stream, kept: int) -> None:
    """Zeroes all but the first `kept` components of every stream but the last."""
    last = len(stream.blocks) * 2
    mask = torch.zeros(stream.width, dtype=torch.float64)
    mask[:kept] = 1
    _written(model, stream, [mask.diag() if i < last else torch.eye(stream.width, dtype=torch.float64) for i in range(last + 1)])
    for _, readers in norms_of(stream)[:-1]:
        for reader in readers:
            weight: Any = model.get_submodule(reader).weight
            weight[:, kept:] = 0
    for i, name in enumerate(stream.blocks):
        block: Any = model.get_submodule(name)
        for at, shortcut in ((2 * i, block.attn_shortcut_Q), (2 * i + 1, block.mlp_shortcut_Q)):
            shortcut[kept:] = 0
            if at + 1 < last:
                shortcut[:, kept:] = 0


def _written(model: nn.Module, stream: Stream, maps: Sequence[Tensor]) -> None:
    """Puts a linear map [D, D] behind everything that writes the stream: maps[0] for tables, then one for each part."""
    for table in stream.tables:
        module: Any = model.get_submodule(table)
        if isinstance(module, nn.Embedding):
            module.weight.copy_((module.weight.double() @ maps[0].t().to(module.weight.device)).to(module.weight.dtype))
        else:
            _after(module, maps[0])
    parts = [f"{b}.{p[i]}" for b, p in zip(stream.blocks, stream.parts, strict=True) for i in (1, 3)]
    for part, one in zip(parts, maps[1:], strict=True):
        for writer in stream.writes[part]:
            _after(model.get_submodule(writer), one)


def _after(linear: Any, one: Tensor) -> None:
    one = one.to(linear.weight.device)
    linear.weight.copy_((one @ linear.weight.double()).to(linear.weight.dtype))
    if linear.bias is not None:
        linear.bias.copy_((one @ linear.bias.double()).to(linear.bias.dtype))


def _untie(model: nn.Module, stream: Stream) -> None:
    """A head that shares the embedding's weight gets its own: the two stand in different bases."""
    tables = {id(model.get_submodule(name).weight) for name in stream.tables}
    for name in stream.heads:
        head: Any = model.get_submodule(name)
        if id(head.weight) in tables:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            if hasattr(config := getattr(model, "config", None), "tie_word_embeddings"):
                config.tie_word_embeddings = False  # type: ignore[union-attr]


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All floating outputs, as float64."""
    found = call(model, inputs)
    leaves = tree_leaves(dict(found) if isinstance(found, Mapping) else found)
    return [x.double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
