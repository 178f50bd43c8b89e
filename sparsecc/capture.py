"""torch.export -> Program, and the adapter between the model's call and the program's flat inputs and outputs."""
from __future__ import annotations

import inspect
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from sparsecc.call import CallAdapter
from sparsecc.errors import CaptureError
from sparsecc.ir.effects import mutates
from sparsecc.ir.infer import infer
from sparsecc.ir.program import Program, get_attr, make_module
from sparsecc.names import Names

_NOISY = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes", "torch.export", "torch._subclasses.fake_tensor")


class Captured(CallAdapter):
    """A program and the call that it was captured from."""

    def __init__(self, program: Program, ep: ExportedProgram, parameters: Sequence[inspect.Parameter]) -> None:
        self.program = program
        self.exported = ep
        super().__init__(ep, parameters)


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "auto",
) -> Captured:
    """Trace the model on example inputs into a functional ATen program.

    `dynamic_shapes`: "auto" lets every dimension of every tensor vary that the model allows to (a size of 0 or 1 in the example
    stays fixed, because models branch on it); None fixes all sizes; else what torch.export takes.
    Raises CaptureError for a model in train mode and where torch.export cannot go.
    """
    if isinstance(model, ExportedProgram):
        ep, parameters = model, []
    else:
        require_eval(model)
        parameters = list(inspect.signature(model.forward).parameters.values())
        with _quiet(), _plain_weights(model), torch.no_grad():
            ep = _export(model, tuple(args), dict(kwargs or {}), dynamic_shapes)
    program = program_of(ep)
    if isinstance(model, nn.Module):
        Names.of(model).put(program)
    return Captured(program, ep, parameters)


def program_of(ep: ExportedProgram) -> Program:
    """Flat placeholders (tensors only) and outputs, weights as shared get_attr; writes to buffers stay as copy_."""
    if any(mutates(node) for node in ep.graph.nodes):
        with torch.no_grad():
            ep = ep.run_decompositions({})
    gm = ep.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    gm.graph.set_codegen(CodeGen())
    for node in list(gm.graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor | torch.SymInt):
            if node.users:
                raise CaptureError(f"input {node.name!r} is a {type(node.meta.get('val')).__name__} that the graph computes with")
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)  # dtypes are the adapter's to check; here they only hold dead values alive
    program = Program(_own(gm), "capture")
    share_tied(program)
    program.finish()
    infer(program)
    return program


def share_tied(program: Program) -> None:
    """One get_attr node per tensor: tied weights become one constant, under the name that comes first."""
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "get_attr" or not node.users or not isinstance(tensor := program.const(node), torch.Tensor):
            continue
        program.origin.setdefault(str(node.target), str(node.target))
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)


def _own(gm: fx.GraphModule) -> fx.GraphModule:
    """A plain GraphModule that shares only the tensors: passes may then add and drop attributes freely. Parameters are detached, since
    `model.double()` puts other data into the very object."""
    attrs = {str(n.target): get_attr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    detached = {name: value.detach() if isinstance(value, nn.Parameter) else value for name, value in attrs.items()}
    return make_module(detached, gm.graph)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    attempts = [dynamic_shapes]
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "auto":
            raise CaptureError(f"dynamic_shapes={dynamic_shapes!r}: use 'auto', None, or what torch.export takes")
        bound = _explicit(model, kwargs).bind(*args, **kwargs).arguments
        pictures = any(isinstance(module, nn.Conv2d) for module in model.modules())
        attempts = [pytree.tree_map(lambda leaf: _auto(leaf, pictures), dict(bound)), None]
    failure: Exception | None = None
    with _named_keywords(model, kwargs):
        for shapes in attempts:
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            except Exception as error:  # export raises whatever the model's code raises
                failure = failure or error
    raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {_reason(failure)}") from failure


def _explicit(model: nn.Module, kwargs: Mapping[str, Any]) -> inspect.Signature:
    """That of forward, with names for those of `kwargs` that it takes as **kwargs."""
    found = inspect.signature(model.forward)
    known = [p for p in found.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(known) == len(found.parameters):
        return found
    extra = [name for name in kwargs if name not in found.parameters]
    return found.replace(parameters=[*known, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)])


@contextmanager
def _named_keywords(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While exporting, forward names all of its arguments: torch.export cannot match dynamic shapes with what stands in **kwargs."""
    signature, had, forward = _explicit(model, kwargs), model.__dict__.get("forward"), model.forward
    if signature == inspect.signature(forward):
        yield
        return

    def explicit(*args: Any, **named: Any) -> Any:
        return forward(*args, **named)

    explicit.__signature__ = signature  # type: ignore[attr-defined]
    model.__dict__["forward"] = explicit
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if had is not None:
            model.__dict__["forward"] = had


def _auto(leaf: Any, pictures: bool) -> Any:
    """Every dimension, but of pictures only the batch: kernels are made for their size."""
    if not isinstance(leaf, torch.Tensor):
        return None
    return {0: Dim.AUTO} if pictures and leaf.ndim == 4 else dict.fromkeys(range(leaf.ndim), Dim.AUTO)


def _reason(error: Exception | None) -> str:
    """The error's first line and the last line of model code that it passed through."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    place, trace = "", error.__traceback__ if error else None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and "sparsecc" not in name:
            place = f" at {name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {first}{place}"


def require_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._NormBase)):
            raise CaptureError(f"{name or type(model).__name__} is in train mode: call model.eval() first, sparsecc compiles for inference")


@contextmanager
def _plain_weights(model: nn.Module) -> Iterator[None]:
    """While exporting, weights in the ecosystem's sparse forms are dense parameters: torch sparse tensors and subclasses of it,
    and `torch.nn.utils.prune`'s weight_orig * weight_mask, whose hooks assign attributes, which export forbids."""
    undo: list[tuple[nn.Module, dict[str, Any], dict[str, Any], Any]] = []
    for module in model.modules():
        pruned = {key: hook for key, hook in module._forward_pre_hooks.items() if hasattr(hook, "apply_mask")}
        sparse = [name for name, p in module._parameters.items() if p is not None and not _is_plain(p)]
        if not (pruned or sparse):
            continue
        undo.append((module, dict(module._parameters), dict(module.__dict__), dict(module._forward_pre_hooks)))
        for key, hook in pruned.items():
            name = hook._tensor_name  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key], module.__dict__[name]
            module._parameters[name] = nn.Parameter(hook.apply_mask(module).detach(), requires_grad=False)  # type: ignore[attr-defined]
        for name in sparse:
            dense = module._parameters[name].detach().to_dense()  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(dense, requires_grad=False)
    try:
        yield
    finally:
        for module, parameters, attributes, hooks in undo:
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor.data) in (torch.Tensor, nn.Parameter)


@contextmanager
def _quiet() -> Iterator[None]:
    """Export warns about every fixed size, and prints graphs and traces of what it cannot take: our errors say it where it matters.

    What the model itself writes to stderr is shown once it is exported."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
        sys.stderr.write(said.getvalue())
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
