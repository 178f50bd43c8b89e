"""compile(): capture -> PIPELINE -> kernels -> module. Reads as the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from sparsecc import debug
from sparsecc.autotune.progress import progress
from sparsecc.autotune.search import Effort
from sparsecc.errors import SpecError, TargetError
from sparsecc.explain import Explanation
from sparsecc.ir.conditional_ops import THROUGH
from sparsecc.ir.core_ops import CORE_TOKENS, PROMPT, RELEASED
from sparsecc.ir.image_ops import WEIGHTED
from sparsecc.ir.merge_ops import MERGE
from sparsecc.ir.ops import KERNELS, LINEAR
from sparsecc.ir.program import NOTES, Program
from sparsecc.ir.route_ops import SCATTER_KEPT
from sparsecc.ir.skip_ops import NEURONS, REQUEST, SCATTER
from sparsecc.ir.text import print_program
from sparsecc.passes import PIPELINE
from sparsecc.passes.context import Attention, Context
from sparsecc.passes.convolution import CONVOLUTION
from sparsecc.passes.manager import History, run_passes
from sparsecc.passes.pack import tokens_of
from sparsecc.runtime.graphs import Graphed, capturable
from sparsecc.runtime.module import CompiledModule
from sparsecc.runtime.remainder import Remainder, begin, finish, undisturbed
from sparsecc.spec import SparsitySpec, SpecLike
from sparsecc.target import check_target, is_elsewhere, require_device, tuner_of

RUN_TIME = (NEURONS, REQUEST, SCATTER, SCATTER_KEPT, THROUGH, MERGE, PROMPT, CORE_TOKENS, RELEASED)
"""What has a region because of what it skips at run time."""
EFFORTS = ("none", "quick", "full")
SECONDS = {"none": 60.0, "quick": 45.0, "full": 600.0}
"""Budget of tuning, in seconds, unless `tune_seconds` is given."""
RACE = 0.5
"""Seconds that two ways to run a whole program are timed."""


@dataclass(frozen=True)
class Options:
    """What `compile` was asked for, checked."""

    target: str = "cpu"
    sparsity: SpecLike = None
    autotune: Effort = "quick"
    tune_seconds: float | None = None
    remainder: Remainder = "auto"
    spec: SparsitySpec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", SparsitySpec.parse(self.sparsity))
        if self.autotune not in EFFORTS:
            raise SpecError(f"autotune={self.autotune!r}: use {', '.join(map(repr, EFFORTS))}")
        if self.remainder not in ("auto", "inductor", "eager"):
            raise SpecError(f"remainder={self.remainder!r}: use 'auto', 'inductor' or 'eager'")
        check_target(self.target)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Options:
        """From names and values. Raises SpecError for a name that is no option, with the closest."""
        known = [one.name for one in fields(Options) if one.init]
        for name in options:
            if name not in known:
                raise SpecError(f"there is no option {name!r}; {debug.closest(name, known)}")
        return Options(**options)

    def tuner(self, on_choice: Callable[[str], None]) -> Any:
        """The target's tuner, None for the reference target. Raises TargetError."""
        seconds = SECONDS[self.autotune] if self.tune_seconds is None else self.tune_seconds
        return tuner_of(self.target, self.autotune, seconds, on_choice)


def compile(
    model: nn.Module | ExportedProgram,
    target: str = "cpu",
    sparsity: SpecLike = None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    dynamic_shapes: Any = "auto",
    autotune: Effort = "quick",
    tune_seconds: float | None = None,
    remainder: Literal["auto", "inductor", "eager"] = "auto",
) -> CompiledModule:
    """A module that computes what `model` computes, with the zeros of its linear and convolution weights skipped where that is faster.

    target: "cpu" (the widest vectors of this machine), "cpu:avx512" | "cpu:avx2" | "cpu:portable", "cuda" (this machine's GPU), a GPU to
      compile for without having it ("cuda:sm_90", "hip:gfx942": to be explained and read, not run), or "reference" (dense meaning).
    sparsity: None or "detect" exploits the zeros that are there; a pattern ("2:4", "block(4, 1)", sparsecc.nm(2, 4)) is a requirement on
      every linear weight; a dict maps globs over module names to patterns, "detect" or "dense".
    example_inputs: the arguments to capture with, a tuple of positional or a dict of keyword ones (or a single tensor); by default
      capture waits for the first call.
    dynamic_shapes: "auto" (whatever can vary may), None (fixed), or what torch.export takes.
    autotune: "none" trusts the cost model, "quick" measures the best few candidates per layer, "full" all; `tune_seconds` caps it.
    remainder: who runs the dense rest: "inductor", "eager", or "auto" (Inductor where there is a C++ compiler).

    The weights are read at compile time: `load_state_dict` on the result compiles again, other changes to the model's weights do not show.
    Raises SpecError, PatternViolation, TargetError, CaptureError (here, or at the first call if capture waits).
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise TypeError(f"compile() takes an nn.Module or an ExportedProgram, not {type(model).__name__}")
    options = Options(target, sparsity, autotune, tune_seconds, remainder)
    if options.target != "reference":
        options.tuner(lambda name: None)  # a target that cannot serve says so now
    if not is_elsewhere(target):
        begin(remainder)
    module = CompiledModule(model, lambda program, inputs: build(program, inputs, options), dynamic_shapes)
    if example_inputs is not None:
        module.capture(*_arguments(example_inputs))
    elif isinstance(model, ExportedProgram):
        module.capture((), {})
    return module


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,) if isinstance(example, torch.Tensor) else tuple(example), {}


@dataclass(frozen=True)
class Built:
    """A program made callable: fn(*flat inputs) -> flat outputs, the history of its passes, and what was decided."""

    run: Callable[..., Sequence[Any]]
    history: History
    explanation: Explanation


def compile_program(program: Program, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Sequence[Any]]:
    """A program (of the Dynamo backend, or parsed from text) as a function over flat inputs. `options` are those of `Options`."""
    return build(program, example_inputs, Options.of(options)).run


def build(program: Program, example_inputs: Sequence[Any], options: Options) -> Built:
    """Run the passes on a captured program, then hand the dense rest to Inductor."""
    require_device(program, options.target)
    knobs = debug.knobs([one.name for one in PIPELINE])
    dumper = debug.Dumper(knobs.dump) if knobs.dump else None
    if dumper is not None:
        dumper.weights(program)
        types = [program.type(node) for node in program.inputs]
        asked = {name: getattr(options, name) for name in ("target", "autotune", "tune_seconds", "remainder")}
        dumper.repro(print_program(program), [t for t in types if t is not None], {**asked, "sparsity": _spec_for(program, options.spec)})
    texts: list[str] = []

    def dump(step: Any) -> None:
        if dumper is not None:
            dumper.stage(len(texts), step.name, step.text, texts[-1] if texts else None)
            texts.append(step.text)

    def once(attention: Mapping[Attention, bool]) -> tuple[History, Context, Callable[..., Sequence[Any]]]:
        """The history, what the passes found out, and what runs."""
        texts.clear()
        with progress(_regions(program), sys.stderr.isatty()) as bar:
            tuner = options.tuner(bar.step)
            context = Context(options.spec, tuner, notes=list(program.gm.meta.get(NOTES, ())), attention=dict(attention))
            history = run_passes(program, PIPELINE, context, disable=knobs.disable, stop_after=knobs.stop_after, on_step=dump)
        return history, context, _runner(history.program, options, tuner)

    history, context, run = once({})
    if context.contested:
        ours, theirs = (history, context, run), once(dict.fromkeys(context.contested, False))
        took = _race({"kernels": ours[2], "torch's": theirs[2]}, example_inputs)
        history, context, run = ours if took and took["kernels"] <= took["torch's"] else theirs
        figures = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in took.items())
        context.notes += [f"attention, the whole model timed both ways: {figures}"] * bool(took)
        texts.clear()
        for step in history.steps:
            dump(step)
    tuner: Any = context.tuner
    if dumper is not None:
        for node in history.program.graph.nodes:
            key = node.args[-1] if node.args and isinstance(node.args[-1], str) else ""
            source = getattr(KERNELS.get(key), "source", None)
            if source is not None:
                dumper.kernel(str(key), source(tokens_of(node.all_input_nodes[0])))
        dumper.weights(history.program, "lowered.safetensors")
    notes: dict[str, Any] = {} if tuner is None else dict(tuner.notes)
    if context.notes:
        notes["notes"] = [*notes.get("notes", []), *context.notes]
    return Built(run, history, explanation(history, options, notes))


def _race(runs: Mapping[str, Callable[..., Any]], inputs: Sequence[Any]) -> dict[str, float]:
    """Seconds of each; nothing for inputs that stand for others and can't be run."""
    if any(isinstance(value, FakeTensor | torch.SymInt) for value in inputs):
        return {}
    return {name: timing.median for name, timing in undisturbed({n: partial(run, *inputs) for n, run in runs.items()}, RACE).items()}


def _runner(program: Program, options: Options, tuner: Any) -> Callable[..., Sequence[Any]]:
    if is_elsewhere(options.target):
        return not_here(options.target)
    run = finish(program, options.remainder, chained=tuner is not None and tuner.between is not None)
    return Graphed(run) if options.target == "cuda" and capturable(program) else run


def not_here(target: str) -> Callable[..., Sequence[Any]]:
    """What a module compiled for another machine does when it is called."""

    def run(*inputs: Any) -> Sequence[Any]:
        raise TargetError(f"this model was compiled for {target!r}, to be looked at: on a machine that has it, compile for 'cuda'")

    return run


def explanation(history: History, options: Options, notes: Mapping[str, Any]) -> Explanation:
    """The regions as they stood before lowering, which returns dense ones to ATen. `notes` go into the header."""
    steps = [step for step in history.steps if step.name != "lower"]
    program = steps[-1].program
    shown = [n for n in program.graph.nodes if n.target is LINEAR or (n.target in (CONVOLUTION, *WEIGHTED) and n.name in program.regions)]
    regions = [program.region(node) for node in shown]
    for node in program.graph.nodes:
        if node.target in RUN_TIME and node.name in program.regions:
            region, known = program.regions[node.name], {region.name for region in regions}
            more = {key: value for key, value in region.more.items() if key != "also"}
            names = [name for name in region.more.get("also", ()) if name not in known]
            regions += [replace(region, name=name, more=more) for name in (*names, region.name)]
    header = {"target": options.target, "threads": torch.get_num_threads(), "autotune": options.autotune, "sparsity": str(options.spec)}
    return Explanation(regions, {**header, **notes}, steps[-1].program.dims)


def _spec_for(program: Program, spec: SparsitySpec) -> SparsitySpec:
    """The entries that this program, alone, has a use for."""
    names = {name.rpartition(".")[0] for name in program.origin.values()} | set(program.origin.values())
    return SparsitySpec(tuple((glob, rule) for glob, rule in spec.entries if any(fnmatchcase(name, glob) for name in names)))


def _regions(program: Program) -> int:
    return sum("linear" in str(node.target) or "addmm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
