"""Making zeros: prune a model's weights in place until they satisfy a spec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsecc.errors import SpecError
from sparsecc.formats import Channels, Heads, Pattern
from sparsecc.names import LINEARS
from sparsecc.prune.budget import Budget
from sparsecc.prune.calibrate import Loss, input_norms
from sparsecc.prune.groups import Coupled
from sparsecc.prune.report import PruneReport, PruneRow
from sparsecc.prune.structured import How, density, plan, remove
from sparsecc.spec import SparsitySpec, SpecLike

Criterion = Literal["magnitude", "wanda", "l1", "l2", "taylor", "cfsp"]
_CRITERIA = ("magnitude", "wanda", "l1", "l2", "taylor", "cfsp")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
"""What channels may be named on; every other pattern is for linears and convolutions."""


@dataclass(frozen=True)
class _Target:
    """A weight to prune, once, however many modules share it."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    pattern: Pattern
    insist: bool

    @property
    def weight(self) -> Tensor:
        weight = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return weight


def prune(
    model: nn.Module,
    spec: SpecLike,
    criterion: Criterion = "magnitude",
    calibration: Iterable[Any] | None = None,
    exclude: Iterable[str] = ("lm_head",),
    *,
    example_inputs: Any = None,
    loss: Loss | None = None,
    budget: Budget | None = None,
    groups: Sequence[Coupled] | None = None,
) -> PruneReport:
    """Sets the lowest-scoring entries of weights to zero, in place, so that each satisfies its pattern in `spec`.

    magnitude: score |W|, compared over the whole weight; l1 is the same, l2 takes W^2.
    wanda:     score |W| * ||x||_2 per input feature, compared within each output row (Sun et al., "A Simple and Effective Pruning
               Approach for Large Language Models", 2023). `calibration` yields inputs (dict, tuple or tensor) for `model`; all
               norms are taken on the dense model in one pass over it, in eval mode.
    For blocks the score is the sum over the block.

    A convolution's weight is a matrix [out, in * kh * kw], so blocks span output channels. A pattern for all weights means linears and
    1 x 1 convolutions; larger ones are pruned where the spec names them, grouped and dilated ones never.

    `channels(...)` and `heads(...)` remove whole channels of linears, convolutions and embeddings, or whole attention heads, with what is
    coupled to them: it is found by following the model on `example_inputs` (by default the first of `calibration`), or given as `groups`.
    Scores are those of `criteria.py`: magnitude (= l1), l2, taylor (with `loss`), cfsp. A `budget` decides how many leave where.

    `exclude` are globs over the module's name or its last part; a weight shared with an embedding is left alone unless the spec names it.
    Raises SpecError, before any weight changes, if the spec cannot be satisfied: a pattern that fixes no sparsity, an unknown glob,
    a weight that isn't a plain floating parameter, channels that others write too or that nobody can follow.
    """
    if criterion not in _CRITERIA:
        raise SpecError(f"unknown criterion {criterion!r}: known are {', '.join(_CRITERIA)}")
    if criterion == "wanda" and calibration is None:
        raise SpecError('criterion="wanda" needs calibration=, an iterable of model inputs')
    targets, skipped = _targets(model, SparsitySpec.parse(spec), tuple(exclude))
    coupled = [t for t in targets if isinstance(t.pattern, Channels | Heads)]
    alone = [t for t in targets if not isinstance(t.pattern, Channels | Heads)]
    if alone and criterion in ("taylor", "cfsp"):
        raise SpecError(f'{alone[0].names[0]}: criterion="{criterion}" scores channels and heads, not {alone[0].pattern}')
    if budget is not None and not coupled:
        raise SpecError(f"{budget.name} is shared out among channels and heads, and the spec names none: add some, such as \"channels\"")
    removals, left = [], {}
    if coupled:
        named = {_parameter(model, t): t for t in coupled}
        how = How(criterion, calibration, example_inputs, loss, budget, groups)
        patterns = {name: t.pattern for name, t in named.items() if isinstance(t.pattern, Channels | Heads)}
        removals, left = plan(model, patterns, [name for name, t in named.items() if t.insist], how)
        left = {named[name].names[0]: reason for name, reason in left.items()}
        skipped |= left
        if not (removals or alone):
            raise SpecError("nothing to prune: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    norms = {}
    if criterion == "wanda" and calibration is not None:
        norms = input_norms(model, {t.names: t.modules for t in alone}, calibration)
    rows = []
    with torch.no_grad():
        for target in alone:
            weight, before = target.weight, density(target.weight)
            score = weight.detach().abs().float().flatten(1)
            score = score * norms[target.names].to(score) if target.names in norms else score.square() if criterion == "l2" else score
            mask = target.pattern.topk_mask(score, per_row=criterion == "wanda")
            weight.masked_fill_(~mask.view(weight.shape), 0)
            rows.append(PruneRow(target.names, str(target.pattern), before, density(weight)))
    rows += remove(model, removals)
    changed = {name for row in rows for name in row.names}
    return PruneReport(tuple(rows), {name: reason for name, reason in skipped.items() if name in left or name not in changed})


def _targets(model: nn.Module, spec: SparsitySpec, exclude: tuple[str, ...]) -> tuple[list[_Target], dict[str, str]]:
    """The weights to prune, all checked, and the layers left alone with the reason."""
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, _LAYERS)}
    linears = {name for name, m in layers.items() if isinstance(m, LINEARS)}
    spec.check_globs([name for name in layers if name in linears or isinstance(spec.rule_for(name).pattern, Channels | Heads)])
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, _Target] = {}
    skipped: dict[str, str] = {}
    for name, module in layers.items():
        rule = spec.rule_for(name)
        if name not in linears and not isinstance(rule.pattern, Channels | Heads):
            continue
        if rule.mode == "require" and rule.pattern is not None:
            reason = _exempt(name, module, spec, exclude, embeddings)
            if not isinstance(rule.pattern, Channels | Heads):
                reason = reason or _unfit(name, module, spec)
        else:
            reason = "dense in the spec" if rule.mode == "dense" else "the spec names no pattern for it"
        if reason or rule.pattern is None:
            skipped[name] = reason
            continue
        _check(name, module, rule.pattern)
        shared = found.get(id(module.weight), _Target((), (), rule.pattern, False))
        if shared.pattern != rule.pattern:
            raise SpecError(f"{shared.names[0]} and {name} share one weight but are to be {shared.pattern} and {rule.pattern}")
        insist = shared.insist or spec.names(name)
        found[id(module.weight)] = _Target((*shared.names, name), (*shared.modules, module), rule.pattern, insist)
    if not found:
        raise SpecError(f"nothing to prune: {spec} names no pattern for any of the model's {len(linears)} linear weights")
    return list(found.values()), skipped


def _unfit(name: str, module: nn.Module, spec: SparsitySpec) -> str:
    """Why a convolution's entries are not pruned."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return ""
    if not isinstance(module, nn.Conv2d) or module.groups > 1 or set(module.dilation) != {1}:
        return "grouped, dilated, transposed, 1d and 3d convolutions stay dense"
    small = set(module.kernel_size) == {1}
    return "" if small or spec.names(name) else "larger than 1 x 1: name it in the spec to include it"


def _exempt(name: str, module: nn.Module, spec: SparsitySpec, exclude: tuple[str, ...], embeddings: set[int]) -> str:
    if any(fnmatchcase(part, glob) for glob in exclude for part in (name, name.rpartition(".")[2])):
        return "excluded"
    if isinstance(module, nn.Embedding) and not spec.names(name):
        return "an embedding"
    if id(module.weight) in embeddings and not spec.names(name):
        return "tied to an embedding"
    return ""


def _check(name: str, module: nn.Module, pattern: Pattern) -> None:
    """Raises SpecError if this weight cannot be pruned to this pattern."""
    if pattern.density is None and not isinstance(pattern, Channels | Heads):
        raise SpecError(f"{name}: {pattern} fixes no sparsity: give one, such as unstructured(0.9), block(4, 1, 0.9) or nm(2, 4)")
    if hasattr(module, "weight_orig"):
        raise SpecError(f"{name} already carries a torch.nn.utils.prune mask: make it permanent with prune.remove(module, 'weight')")
    weight = module.weight
    if "weight" not in module._parameters or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise SpecError(f"{name}.weight is not a plain floating parameter (parametrized or quantized): exclude={name!r} leaves it out")
    if weight.layout != torch.strided or weight.is_meta:
        raise SpecError(f"{name}.weight holds no strided values ({weight.layout}, {weight.device}): load or densify it first")


def _parameter(model: nn.Module, target: _Target) -> str:
    """The first name of the target's weight, which the walk over the model uses."""
    return next(name for name, p in model.named_parameters(remove_duplicate=False) if p is target.weight)
