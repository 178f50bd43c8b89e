"""Making zeros: prune a model's linear and convolution weights in place until they satisfy a spec."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .errors import SpecError
from .formats.pattern import Pattern
from .names import LINEARS
from .spec import SparsitySpec, SpecLike

Criterion = Literal["magnitude", "wanda"]


@dataclass(frozen=True)
class PruneRow:
    """One weight: its density (fraction of nonzeros) before and after; `names` are the modules that share it."""

    names: tuple[str, ...]
    pattern: str
    before: float
    after: float

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did; `skipped` maps a linear that it left alone to the reason."""

    rows: tuple[PruneRow, ...]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [{"name": row.name, **asdict(row)} for row in self.rows], "skipped": dict(self.skipped)}

    def __rich__(self) -> Table:
        table = Table("weight", "pattern", "density before", "after", title="pruned")
        for row in self.rows:
            table.add_row(" = ".join(row.names), row.pattern, f"{100 * row.before:.1f} %", f"{100 * row.after:.1f} %")
        for name, reason in self.skipped.items():
            table.add_row(name, f"[dim]left alone: {reason}[/dim]", "", "")
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as text:
            console.print(self)
        return text.get()


@dataclass(frozen=True)
class _Target:
    """A weight to prune, once, however many modules share it."""

    names: tuple[str, ...]
    modules: tuple[Any, ...]
    pattern: Pattern

    @property
    def weight(self) -> Tensor:
        return self.modules[0].weight


def prune(
    model: nn.Module,
    spec: SpecLike,
    criterion: Criterion = "magnitude",
    calibration: Iterable[Any] | None = None,
    exclude: Iterable[str] = ("lm_head",),
) -> PruneReport:
    """Sets the lowest-scoring entries of linear and convolution weights to zero, in place, so that each satisfies its pattern in `spec`.

    A convolution's weight is a matrix [out, in * kh * kw], so blocks span output channels. A pattern for all weights means linears and
    1 x 1 convolutions; larger ones are pruned where the spec names them, grouped and transposed ones never.

    magnitude: score |W|, compared over the whole weight.
    wanda:     score |W| * ||x||_2 per input feature, compared within each output row (Sun et al., "A Simple and Effective Pruning
               Approach for Large Language Models", 2023). `calibration` yields inputs (dict, tuple or tensor) for `model`; all
               norms are taken on the dense model in one pass over it, in eval mode.
    For blocks the score is the sum over the block. `exclude` are globs over the module's name or its last part; a weight shared
    with an embedding is left alone unless the spec names it. Raises SpecError, before any weight changes, if the spec cannot be
    satisfied: a pattern that fixes no sparsity, an unknown glob, a weight that isn't a plain floating parameter.
    """
    if criterion not in ("magnitude", "wanda"):
        raise SpecError(f"unknown criterion {criterion!r}: known are magnitude, wanda")
    if criterion == "wanda" and calibration is None:
        raise SpecError('criterion="wanda" needs calibration=, an iterable of model inputs')
    targets, skipped = _targets(model, SparsitySpec.parse(spec), tuple(exclude))
    norms = _input_norms(model, targets, calibration) if criterion == "wanda" and calibration is not None else {}
    rows = []
    with torch.no_grad():
        for target in targets:
            weight, before = target.weight, _density(target.weight)
            score = weight.detach().abs().float().flatten(1)
            if target.names in norms:
                score *= norms[target.names].to(score)
            mask = target.pattern.topk_mask(score, per_row=criterion == "wanda")
            weight.masked_fill_(~mask.view(weight.shape), 0)
            rows.append(PruneRow(target.names, str(target.pattern), before, _density(weight)))
    return PruneReport(tuple(rows), skipped)


def _targets(model: nn.Module, spec: SparsitySpec, exclude: tuple[str, ...]) -> tuple[list[_Target], dict[str, str]]:
    """The weights to prune, all checked, and the linears left alone with the reason."""
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LINEARS)}
    spec.check_globs(linears)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, _Target] = {}
    skipped: dict[str, str] = {}
    for name, module in linears.items():
        rule = spec.rule_for(name)
        if rule.mode == "require" and rule.pattern is not None:
            reason = _exempt(name, module, spec, exclude, embeddings) or _unfit(name, module, spec)
        else:
            reason = "dense in the spec" if rule.mode == "dense" else "the spec names no pattern for it"
        if reason or rule.pattern is None:
            skipped[name] = reason
            continue
        _check(name, module, rule.pattern)
        shared = found.get(id(module.weight), _Target((), (), rule.pattern))
        if shared.pattern != rule.pattern:
            raise SpecError(f"{shared.names[0]} and {name} share one weight but are to be {shared.pattern} and {rule.pattern}")
        found[id(module.weight)] = _Target((*shared.names, name), (*shared.modules, module), rule.pattern)
    if not found:
        raise SpecError(f"nothing to prune: {spec} names no pattern for any of the model's {len(linears)} linear weights")
    return list(found.values()), skipped


def _unfit(name: str, module: nn.Module, spec: SparsitySpec) -> str:
    """Why a convolution is not pruned."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ""
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or set(module.dilation) != {1}:
        return "grouped, dilated, transposed, 1d and 3d convolutions stay dense"
    small = set(module.kernel_size) == {1}
    return "" if small or spec.names(name) else "larger than 1 x 1: name it in the spec to include it"


def _exempt(name: str, module: nn.Module, spec: SparsitySpec, exclude: tuple[str, ...], embeddings: set[int]) -> str:
    if any(fnmatchcase(part, glob) for glob in exclude for part in (name, name.rpartition(".")[2])):
        return "excluded"
    if id(module.weight) in embeddings and not spec.names(name):
        return "tied to an embedding"
    return ""


def _check(name: str, module: Any, pattern: Pattern) -> None:
    """Raises SpecError if this weight cannot be pruned to this pattern."""
    if pattern.density is None:
        raise SpecError(f"{name}: {pattern} fixes no sparsity: give one, such as unstructured(0.9), block(4, 1, 0.9) or nm(2, 4)")
    if hasattr(module, "weight_orig"):
        raise SpecError(f"{name} already carries a torch.nn.utils.prune mask: make it permanent with prune.remove(module, 'weight')")
    if "weight" not in module._parameters or not module.weight.is_floating_point():
        raise SpecError(f"{name}.weight is not a plain floating parameter (parametrized or quantized): exclude={name!r} leaves it out")
    if module.weight.layout != torch.strided or module.weight.is_meta:
        raise SpecError(f"{name}.weight holds no strided values ({module.weight.layout}, {module.weight.device}): load or densify it first")


def _input_norms(model: nn.Module, targets: list[_Target], calibration: Iterable[Any]) -> dict[tuple[str, ...], Tensor]:
    """names of a target -> root mean square of each input feature over all calibration rows, float64[K].

    The mean differs from the L2 norm by one factor per weight, which no comparison sees, and does not overflow.
    """
    totals = {target.names: torch.zeros(target.weight[0].numel(), dtype=torch.float64) for target in targets}
    counts = dict.fromkeys(totals, 0)

    def watch(names: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if isinstance(module, nn.Conv2d):  # a channel's norm serves all taps of the window
                x = x.movedim(1, -1).repeat_interleave(module.weight[0, 0].numel(), -1)
            x = x.detach().reshape(-1, x.shape[-1]).float()
            totals[names] += x.square().sum(0, dtype=torch.float64).cpu()
            counts[names] += x.shape[0]

        return hook

    hooks = [m.register_forward_pre_hook(watch(t.names), with_kwargs=True) for t in targets for m in dict.fromkeys(t.modules)]
    try:
        with torch.no_grad(), _evaluating(model):
            for inputs in calibration:
                _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for names, total in totals.items():
        if not counts[names]:
            raise SpecError(f"{names[0]} was never called during calibration: exclude it or give inputs that reach it")
        if not total.isfinite().all():
            raise SpecError(f"{names[0]} saw NaN or infinite inputs during calibration")
    return {names: (total / counts[names]).sqrt() for names, total in totals.items()}


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, tuple | list):
        model(*inputs)
    else:
        model(inputs)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel() if weight.numel() else 0.0
