"""What the user asks to be skipped at run time: neurons of feed-forward blocks, tokens of transformer blocks. Values of a sparsity dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsecc.errors import SpecError
from sparsecc.ir.policy import Policy, parse_policy
from sparsecc.routing import DepthRouter, TokenRouter, depth_router, token_policy, token_router

ROUTERS = ("static",)
REQUEST_SCORES = ("griffin", "core")
"""How a prompt ranks neurons: by the norm of their share in each token (GRIFFIN), or by how many tokens count them among their largest
(CoreInfer; CoreMatching's own definition is in `cores.py`)."""


@dataclass(frozen=True)
class Neurons:
    """Which neurons of a feed-forward block count for a token.

    policy: on |a|, a = act(gate x) or act(fc1 x); see `ir/policy.py`. levels: thresholds from a calibration, by the name of the block,
    f32[F] or f32[1]; blocks that it does not name have the policy's own number. score: "" for a set of neurons per token, else how the
    prompt of a request chooses the set that its generated tokens use (REQUEST_SCORES), kept in `sets` by the block's name.
    """

    policy: Policy
    levels: dict[str, Tensor] = field(default_factory=dict, compare=False, hash=False)
    score: str = ""
    sets: dict[str, Tensor] = field(default_factory=dict, compare=False, hash=False)

    def __str__(self) -> str:
        return f"neurons({self.policy}{', calibrated' if self.levels else ''}{f', per request by {self.score}' if self.score else ''})"

    def set_of(self, name: str, count: int) -> Tensor:
        """The block's set i32[K], the same tensor for every graph of a model: -1 before the first prompt, which stands for all neurons."""
        size = self.policy.size(count)
        assert size is not None
        if name not in self.sets or self.sets[name].numel() != size:
            self.sets[name] = torch.full((size,), -1, dtype=torch.int32)
        return self.sets[name]


@dataclass(frozen=True)
class Tokens:
    """Which tokens a transformer block is run on; all others pass it unchanged.

    schedule: the fraction that each recognised block under the glob skips, in program order, in [0, 1); one number for all of them.
    router: "static" keeps the first token and the latest ones; the others are learned.
    positions: "original" (rotary embeddings and masks are those of the token's place in the sequence) or "compact" (it is renumbered).
    policy: of the router's scores; None keeps what the schedule says, and an empty schedule leaves everything to the policy.
    scale: what is multiplied by the router's probability, "mlp", "block" (what the block adds) or "none".
    span: tokens first:end, a slice, that compete; the others are always kept.
    keys: "kept" (skipped tokens are no keys in the block, and write none into its KV cache) or "all" (they are, and do).
    decode: tokens after a prompt go through "all" blocks, or as they are "routed": one that goes past a block is a key in it or isn't, as
    `keys` says of a prompt's.
    cached: keys and values are outputs of the graph, see `methods/cached.py`.
    """

    schedule: tuple[float, ...]
    router: str | TokenRouter | DepthRouter = "static"
    positions: str = "original"
    policy: Policy | None = None
    scale: str = "none"
    span: tuple[int | None, int | None] | None = None
    keys: str = "kept"
    decode: str = "all"
    cached: bool = False

    def __str__(self) -> str:
        keys = ("" if self.keys == "kept" else ", all keys") + ("" if self.decode == "all" else ", decode routed")
        if isinstance(self.router, DepthRouter):
            scaled = "" if self.scale == "none" else f", {self.scale} scaled"
            return f"mixture_of_depths({self.policy}, {self.router}, {self.positions}{scaled}{keys})"
        return f"ftp({list(self.schedule)}, {self.router}{f', {self.policy}' if self.policy else ''}, {self.positions}{keys})"

    @property
    def by_scores(self) -> bool:
        """Whether the number of kept tokens depends on scores, or on padding, and not on the length alone."""
        return self.policy is not None and (not self.policy.fixed or self.span is not None)

    def skipped(self, block: int, blocks: int) -> float | None:
        """The fraction that a block skips, None where it isn't known. Raises SpecError where the schedule is of another length."""
        if not self.schedule:
            return None
        if len(self.schedule) == 1:
            return self.schedule[0]
        if len(self.schedule) != blocks:
            raise SpecError(
                f"the schedule has {len(self.schedule)} entries, but {blocks} blocks were recognised under its glob: give one per block")
        return self.schedule[block]


def neurons(
    top: float | int | None = None, *, threshold: float | None = None, stat: float | None = None, at_least: float | None = None,
    policy: str | None = None, levels: dict[str, Tensor] | None = None, per_request: str = "",
) -> Neurons:
    """Neurons to compute, for the values of a sparsity dict; without arguments those that are not zero, which is exact for ReLU.

    top: so many (an int) or this fraction of them (a float), the largest |a| of every token; an approximation that is asked for here.
    threshold: those with |a| larger than it (CATS); at_least: with |a| of at least it (FATReLU); stat: about this fraction, by mean and
    deviation of the row, less the threshold (Spark); policy: any of `ir/policy.py` by its text; levels: see `methods/cats.py`.
    per_request: "griffin" or "core": the prompt, computed in full, chooses `top` neurons for the tokens that are generated after it.
    Raises SpecError.
    """
    given = {"top": top, "threshold": threshold, "stat": stat, "at_least": at_least, "policy": policy}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise SpecError(f"neurons() takes one of {', '.join(given)}; got {', '.join(named)}")
    if policy is not None:
        chosen = parse_policy(policy)
    elif top is not None:
        if isinstance(top, bool) or not isinstance(top, int | float):
            raise SpecError(f"neurons(top={top!r}): a number of neurons, or a fraction of them")
        chosen = Policy("topk", top) if isinstance(top, int) else Policy("ratio", top)
    elif stat is not None:
        chosen = Policy("stat", float(stat))
    elif threshold is not None or at_least is not None:
        name, value = ("threshold", threshold) if threshold is not None else ("atleast", at_least)
        if value is None or not value >= 0:
            raise SpecError(f"neurons({name}={value!r}): thresholds on |a| are 0 or larger")
        chosen = Policy(name, float(value))
    else:
        chosen = Policy("threshold", 0.0) if levels else Policy("nonzero")
    if chosen.name in ("knee", "mass"):
        raise SpecError(f"neurons(policy={str(chosen)!r}): {chosen.name} is no policy for neurons; use topk, ratio, threshold, stat")
    if per_request and (per_request not in REQUEST_SCORES or chosen.name not in ("topk", "ratio")):
        raise SpecError(f"neurons(per_request={per_request!r}): use {' or '.join(map(repr, REQUEST_SCORES))}, with top=")
    return Neurons(chosen, dict(levels or {}), per_request)


def ftp(
    schedule: Sequence[float] | float | None = None, router: str | Path | Mapping[str, Tensor] | TokenRouter = "static",
    positions: str = "original", policy: str | None = None, keys: str = "kept", decode: str = "all",
) -> Tokens:
    """Token skipping by a schedule (FTP: fine-grained token-wise pruning, AMD 2024), for the values of a sparsity dict.

    schedule: the fraction of tokens that each block skips, one number for all or one per block, each in [0, 1); None is the checkpoint's.
    router: "static", or a learned one, see `routing.token_router`. policy: of a learned router's probabilities, "threshold(0.5)" unless
    given; "schedule" keeps exactly as many as the schedule says. keys: see `Tokens`; a learned router ranks tokens by what they are paid
    as keys, and takes "kept". decode: see `Tokens`; the static router keeps every latest token. Blocks that skip 0 are left whole.
    Raises SpecError.
    """
    if isinstance(router, str) and router != "static" and not Path(router).is_file():
        raise SpecError(f"ftp(router={router!r}): the router is {' or '.join(map(repr, ROUTERS))}, a file or a dict of tensors")
    learned = None if router == "static" else token_router(router)
    if schedule is None:
        if learned is None or learned.schedule is None:
            raise SpecError("ftp(schedule=None): give the fraction that each block skips, the checkpoint doesn't have it")
        schedule = learned.schedule
    values = tuple(float(v) for v in ([schedule] if isinstance(schedule, int | float) else schedule))
    if not values:
        raise SpecError("ftp(schedule=[]): give the fraction that each block skips")
    for i, value in enumerate(values):
        if not 0 <= value < 1:
            raise SpecError(f"ftp: schedule[{i}] = {value} lies outside [0, 1): it is the fraction of tokens that the block skips")
    if learned is None and policy not in (None, "schedule"):
        raise SpecError(f"ftp(policy={policy!r}): policies judge scores, which a learned router gives; the static one follows its schedule")
    _check_positions("ftp", positions, keys)
    if learned is None:
        if decode != "all":
            raise SpecError(f"ftp(decode={decode!r}): the static router keeps the latest token, use 'all' or a learned router")
        return Tokens(values, "static", positions, keys=keys)
    if keys != "kept":
        raise SpecError(f"ftp(keys={keys!r}): with a learned router skipped tokens are no keys, use 'kept'")
    found = None if policy == "schedule" else token_policy(policy or "threshold(0.5)", "ftp(policy=...)")
    _check_decode("ftp", decode, found)
    return Tokens(values, learned, positions, found, decode=decode)


def mixture_of_depths(
    router: str | Path | Tensor | Mapping[str, Tensor], policy: str = "threshold(0.005)", scale: Literal["mlp", "block", "none"] = "mlp",
    positions: str = "compact", span: tuple[int | None, int | None] | None = None, reads: Literal["norm", "stream"] = "norm",
    keys: str = "kept", decode: str = "all",
) -> Tokens:
    """Blocks on the tokens that a router picks (Raposo et al. 2024; the defaults are gamma-MoD's, Luo et al. 2024), for a sparsity dict.

    router: see `routing.depth_router`. policy: of its probabilities, see `ir/policy.py`. scale: what the probability multiplies, the
    feed-forward branch, all that the block adds, or nothing. span: tokens first:end, a slice, that compete; others, such as text around an
    image, are always kept. reads: what the router is applied to. keys, decode: see `Tokens`. Raises SpecError.
    """
    if scale not in ("mlp", "block", "none"):
        raise SpecError(f"mixture_of_depths(scale={scale!r}): use 'mlp', 'block' or 'none'")
    if span is not None and (len(span) != 2 or not all(v is None or (isinstance(v, int) and not isinstance(v, bool)) for v in span)):
        raise SpecError(f"mixture_of_depths(span={span!r}): give the first token that competes and the end, as of a slice")
    _check_positions("mixture_of_depths", positions, keys)
    found = token_policy(policy, "mixture_of_depths(policy=...)")
    _check_decode("mixture_of_depths", decode, found)
    if decode != "all" and span is not None:
        raise SpecError("mixture_of_depths(decode='routed'): tokens outside of span= are always kept, leave it out")
    return Tokens((), depth_router(router, reads), positions, found, scale, None if span is None else (span[0], span[1]), keys, decode)


def _check_decode(what: str, decode: str, policy: Policy | None) -> None:
    if decode not in ("all", "routed"):
        raise SpecError(f"{what}(decode={decode!r}): use 'all' or 'routed'")
    if decode == "routed" and (policy is None or policy.name not in ("threshold", "atleast")):
        raise SpecError(f"{what}(decode='routed'): of one token its score alone decides, use policy='threshold(...)' or 'atleast(...)'")


def _check_positions(what: str, positions: str, keys: str) -> None:
    if keys not in ("kept", "all"):
        raise SpecError(f"{what}(keys={keys!r}): use 'kept' or 'all'")
    if positions not in ("original", "compact"):
        raise SpecError(f"{what}(positions={positions!r}): use 'original' or 'compact'")
    if (keys, positions) == ("all", "compact"):
        raise SpecError(f"{what}(keys='all'): keys of all tokens lie at their places in the sequence, use positions='original'")


def matches(glob: str, names: Sequence[str]) -> bool:
    """Whether a glob names a module: by its whole name, or by the end of it from some dot on."""
    ends = [name.split(".", i)[-1] for name in names for i in range(name.count(".") + 1)]
    return any(fnmatchcase(end, glob) for end in ends)


def level_of(levels: Mapping[str, Tensor], name: str, count: int) -> Tensor | None:
    """The thresholds of a block or linear, f32[count] or f32[1]; None where it has none. Raises SpecError on a wrong size."""
    found = levels.get(name)
    if found is not None:
        found = torch.as_tensor(found, dtype=torch.float32).detach().flatten()
        if found.numel() not in (1, count) or bool(found.isnan().any()):
            raise SpecError(f"the thresholds of {name} are {list(found.shape)} numbers (NaN is none): wanted 1 or {count}")
    return found
