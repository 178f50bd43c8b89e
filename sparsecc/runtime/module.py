"""CompiledModule: the model's own call, served by compiled programs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sparsecc.capture import Captured, capture, require_eval
from sparsecc.errors import CaptureError, ShapeError, SparseccError, TargetError
from sparsecc.explain import Explanation
from sparsecc.ir.infer import value_of
from sparsecc.ir.program import Program
from sparsecc.names import Names

VARIANTS = 8
"""How many captures of one model (other argument structures, other fixed sizes) a module keeps."""

Build = Callable[[Program, Sequence[Any]], Any]


@dataclass(frozen=True)
class Variant:
    """One capture, what was built from it, and the devices that its inputs must be on."""

    captured: Captured
    built: Any
    devices: tuple[torch.device, ...]

    def __call__(self, flat: Sequence[torch.Tensor]) -> Any:
        for tensor, device, wanted in zip(flat, self.devices, self.captured.inputs, strict=True):
            if tensor.device != device:
                raise TargetError(f"{wanted.name} is on {tensor.device}, the module was compiled for {device}: move the input there")
        return self.captured.unflatten(self.built.run(*flat))


class CompiledModule(nn.Module):
    """An nn.Module with the model's signature, outputs, parameters and state_dict; for inference, its results carry no gradients.

    It captures at the first call unless it was compiled with example inputs; a call that no capture fits is captured too (with
    explicit example inputs it raises ShapeError). What torch.export cannot take, such as a KV cache, goes through Dynamo.
    Calls are safe from several threads. It cannot be pickled, moved or cast: save the model, and compile after loading.
    After a change to the model's weights other than by `load_state_dict` here, compile again: sparse layers hold packed copies.
    """

    def __init__(self, model: nn.Module | ExportedProgram, build: Build, dynamic_shapes: Any = "auto") -> None:
        super().__init__()
        self.training = False
        self.__dict__["_model"] = model  # not a submodule: names in state_dict stay the model's
        self._build = build
        self._dynamic_shapes = dynamic_shapes
        self._example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
        self._variants: list[Variant] = []
        self._dynamo: Callable[..., Any] | None = None
        self._graphs: list[Any] = []
        self._lock = threading.RLock()

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Capture and compile for these example inputs; calls must then fit them. Raises CaptureError."""
        self._example = (args, kwargs)
        self._add(args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call of nn.Module, which torch.export replaces for all threads while one of them captures; ours goes around it."""
        hooked = self._forward_hooks or self._forward_pre_hooks
        return super().__call__(*args, **kwargs) if hooked else self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        variants, misfit = self._variants, None
        for variant in variants:
            try:
                flat = variant.captured.flatten(args, kwargs)
                variant.captured.check(flat)
            except ShapeError as error:
                misfit = misfit or error
                continue
            return variant(flat)
        if self._dynamo is not None:
            with torch.no_grad():
                return self._dynamo(*args, **kwargs)
        if misfit is not None and self._example is not None:
            raise misfit
        if misfit is not None and len(variants) >= VARIANTS:
            raise ShapeError(f"{misfit}. {VARIANTS} captures are kept at most: give example_inputs and dynamic_shapes to compile()")
        with self._lock:
            self._serve(args, kwargs)
        return self.forward(*args, **kwargs)

    def _serve(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make a variant for this call, by export where it can go, else switch to Dynamo."""
        if self._dynamo is not None or any(_fits(variant.captured, args, kwargs) for variant in self._variants):
            return  # another thread did it
        if self._example is not None:  # weights were loaded since
            self._add(*self._example)
            return
        model, reason = self._model, None
        require_eval(model)
        if not has_cache(model, args, kwargs):
            try:
                self._add(args, kwargs)
                return
            except CaptureError as error:
                reason = error
            _try(model, args, kwargs)
        self._dynamo = self._through_dynamo(model, reason)

    def _through_dynamo(self, model: nn.Module, reason: Exception | None) -> Callable[..., Any]:
        """torch.compile with our backend; `reason` is why export could not go, shown if Dynamo cannot either."""
        from sparsecc.dynamo import Frozen

        names = Names.of(model)
        known = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}

        def compile_program(program: Program, inputs: Sequence[Any]) -> Callable[..., Any]:
            names.put(program)
            built = self._build(program, inputs)
            self._graphs.append(built)
            return built.run

        def backend(gm: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return Frozen(gm, compile_program, known)

        # The model's own attributes are read now, as by export; to fetch and compare hundreds of them in each call would take longer than
        # some layers.
        unguarded: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        compiled = torch.compile(model, backend=backend, dynamic=True, options=unguarded)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                with torch._dynamo.config.patch(prepare_freezing=True, specialize_float=True):
                    return compiled(*args, **kwargs)
            except BackendCompilerFailed as error:
                inner = error.inner_exception if hasattr(error, "inner_exception") else error.__cause__
                raise (inner if isinstance(inner, SparseccError) else CaptureError(f"{error}; torch.export: {reason}")) from error

        return call

    def _add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        captured = capture(self._model, args, kwargs, self._dynamic_shapes)
        flat = captured.flatten(args, kwargs) if args or kwargs else []
        devices = tuple(value_of(node).device for node in captured.program.inputs)
        self._variants.append(Variant(captured, self._build(captured.program, flat), devices))

    # ---- what was done

    @property
    def graphs(self) -> list[Any]:
        """One entry per compiled graph: `.history` of its passes, `.explanation`."""
        return [variant.built for variant in self._variants] + list(self._graphs)

    def explain(self, graph: int = 0) -> Explanation:
        """The table of decisions, of the first graph or another. Raises CaptureError before anything was compiled."""
        return self._graph(graph).explanation

    def ir(self, stage: str | None = None, graph: int = 0) -> str:
        """The program after a pass ("capture" is what came in), by default the pass history: a line per stage.

        Raises SpecError for an unknown stage."""
        history = self._graph(graph).history
        if stage is not None:
            return history.after(stage).text
        lines = (f"{s.name:<14}{len(s.program.graph.nodes):>6} nodes {1e3 * s.seconds:>9.1f} ms" for s in history.steps)
        return "\n".join(f"{i:02d} {line}" for i, line in enumerate(lines))

    def graph(self, kind: str = "svg", graph: int = 0) -> bytes:
        """A picture of the compiled program, "png" or "svg": what runs sparse, and what slices have left.

        Raises SpecError for another kind, TargetError without matplotlib."""
        from sparsecc.draw import picture

        history = self._graph(graph).history
        steps = [step for step in history.steps if step.name != "lower"]
        names = [step.name for step in steps]
        before = steps[names.index("propagate") - 1].program if "propagate" in names else None
        return picture(steps[-1].program, steps[-1].program.regions, kind, before)

    def _graph(self, index: int) -> Any:
        graphs = self.graphs
        if not graphs:
            raise CaptureError("nothing is compiled yet: call the module once, or give example_inputs to compile()")
        return graphs[index]

    # ---- the model's state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        if isinstance(self._model, ExportedProgram):
            return dict(self._model.state_dict)
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads into the model; the next call compiles again. Raises CaptureError for an exported program."""
        if isinstance(self._model, ExportedProgram):
            raise CaptureError("an ExportedProgram's weights are fixed: load them into the model, export it and compile again")
        with self._lock:
            try:
                return self._model.load_state_dict(state_dict, *args, **kwargs)
            finally:  # some may have been loaded before an error
                self._variants, self._graphs, self._dynamo = [], [], None

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's own."""
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's own."""
        return self._model.named_buffers(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        """`.to`, `.half`, `.cuda` and the like: what changes nothing is allowed. Raises TargetError."""
        for tensor in self.parameters():
            probe = tensor.detach()[:0] if tensor.ndim else tensor.detach()
            moved = fn(probe)
            if (moved.device, moved.dtype) != (probe.device, probe.dtype):
                what = moved.device if moved.device != probe.device else moved.dtype
                raise TargetError(f"a compiled module cannot be moved or cast to {what}: do that to the model, then compile it")
        return self

    def train(self, mode: bool = True) -> CompiledModule:
        """Compiled modules are for inference. Raises CaptureError for mode=True."""
        if mode:
            raise CaptureError("a compiled module is for inference: train the model, then compile it again")
        return self

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model (config, dtype, ...) are the compiled module's too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_model")
            if model is None or name.startswith("__"):
                raise
            return getattr(model, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CaptureError("a compiled module holds machine code and cannot be pickled or copied: save the model and compile after loading")


def has_cache(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call carries or would return a KV cache, which torch.export does not keep."""
    given = pytree.tree_leaves((tuple(args), dict(kwargs)), is_leaf=lambda value: type(value).__name__.endswith("Cache"))
    if any(type(value).__name__.endswith("Cache") for value in given):
        return True
    config = getattr(model, "config", None)
    decodes = getattr(model, "can_generate", None)
    wanted = kwargs.get("use_cache", getattr(config, "use_cache", False))
    return bool(wanted and callable(decodes) and decodes())


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model as it is: a call that the model itself refuses raises the model's own error. Its buffers are put back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise error from None
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _fits(captured: Captured, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    try:
        captured.check(captured.flatten(args, kwargs))
    except ShapeError:
        return False
    return True
