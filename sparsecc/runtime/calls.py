"""A linear with made-up activations, for the contest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecc.codegen.config import to_text
from sparsecc.codegen.kernel import FEW
from sparsecc.codegen.tvm.tiles import SPAN
from sparsecc.formats import Format
from sparsecc.ir.image_ops import out_size
from sparsecc.ir.ops import ACTIVATIONS, empty_output
from sparsecc.passes.context import Picture, Problem, Tuner
from sparsecc.runtime.record import Pool, Recorder

FOOTPRINT, COPIES = 128 << 20, 64
"""Bytes of copies of a weight that is timed with a few tokens on a CPU, and how many copies at most."""


class Call:
    """The problem with made-up activations, on the weight's device: as the dense code runs it, as a candidate does, and in float64.

    Token-minor values lie as in a chain, in spans, here as so many sequences."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        N, K = problem.weight.shape
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random).to(problem.weight)  # noqa: E731
        spans = problem.tokens // SPAN if problem.chained and problem.tokens % SPAN == 0 else 1
        lead = (spans, problem.tokens // spans) if problem.chained else (problem.tokens,)
        self.x, self.bias = draw(*lead, K), draw(N)
        self.res = draw(*lead, N) if problem.residual else None
        self.act = ACTIVATIONS[problem.epilogue].fn
        lossy = any(str(fmt.codec) != "f32" for fmt in problem.formats)
        self.rounding = 1e-2 if lossy or problem.weight.dtype != torch.float32 else 0.0

    def dense(self) -> Callable[[], Tensor]:
        """torch's own code on the weight as it is."""
        turn = itertools.cycle(self._copies([self.problem.weight.contiguous()]))

        def run() -> Tensor:
            y = self.act(F.linear(self.x, next(turn)[0], self.bias))
            return y if self.res is None else y + self.res

        return run

    def candidate(self, tuner: Tuner, fmt: Format, config: Any) -> Callable[[], Tensor]:
        """A kernel on the packed weight."""
        weight, tokens = self.problem.weight, self.problem.tokens
        shape = (weight.shape[0], weight.shape[1])
        layout = self.problem.layout
        _, made = tuner.kernel((fmt,), self.problem.epilogue, self.res is not None, layout, shape, to_text(config), weight.dtype, tokens)
        kernel: Any = made
        if self.problem.chained:
            return self._in_chain(kernel, list(fmt.pack(weight).values()))
        turn = itertools.cycle(self._copies([array.to(weight.device) for array in fmt.pack(weight).values()]))
        kernel.prepare(tokens, weight.dtype)
        return lambda: kernel(self.x, next(turn), self.bias, self.res)

    def _in_chain(self, kernel: Any, params: list[Tensor]) -> Callable[[], Tensor]:
        """The kernel as a chain runs it: in float32 whatever the model is, sizes and memory are there. What comes in or leaves as rows of
        another dtype is converted."""
        problem, dtype, wide = self.problem, self.x.dtype, self.x.float()
        x = _minor(wide) if problem.reads == "token" else wide
        res = self.res if self.res is None else _minor(self.res.float()) if problem.layout == "token" else self.res.float()
        bias = self.bias.float()
        with Recorder(Pool()) as recorder:
            y = kernel(x, params, bias, res)
        calls, keep = recorder.calls, (recorder.pool, kernel, x, params, bias, res)
        comes, leaves = (dtype != torch.float32 and layout == "row" for layout in (problem.reads, problem.layout))

        def run(keep: Any = keep) -> Tensor:
            if comes:
                x.copy_(self.x)
            for code, args in calls:
                code(*args)
            return y.to(dtype) if leaves else y

        return (lambda: kernel(x, params, bias, res)) if recorder.foreign else run

    def _copies(self, params: list[Tensor]) -> list[list[Tensor]]:
        """The weight as often as it takes to find it out of the caches, as a token of a model does whose other layers ran meanwhile. With
        many tokens it is read once for all of them, and a GPU's cache is flushed by the one who times."""
        if self.problem.tokens > FEW or self.problem.weight.device.type != "cpu":
            return [params]
        count = min(COPIES, -(-FOOTPRINT // max(1, sum(p.nbytes for p in params))))
        return [params, *([p.clone() for p in params] for _ in range(count - 1))]

    def reference(self) -> Tensor:
        """float64."""
        y = self.act(F.linear(self.x.double(), self.problem.weight.double(), self.bias.double()))
        return y if self.res is None else y + self.res.double()


class PictureCall(Call):
    """A convolution of one picture for each thread, at most the problem's: as torch runs it on channels-last pictures, and as a candidate
    does on planes, with the patches made that it needs."""

    def __init__(self, problem: Problem, picture: Picture) -> None:
        self.problem, self.picture = problem, picture
        weight, random = problem.weight, torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
        B, C, (H, W) = max(1, min(picture.B, torch.get_num_threads())), picture.channels, picture.size
        self.x, self.bias = draw(B, C, H, W), draw(weight.shape[0])
        self.kernel = weight.view(weight.shape[0], C, *picture.window[:2])
        OH, OW = out_size(picture.size, picture.window, picture.pads)
        self.res = draw(B, weight.shape[0], OH, OW) if problem.residual else None
        self.act, self.rounding = ACTIVATIONS[problem.epilogue].fn, 1e-2 if any(str(fmt.codec) != "f32" for fmt in problem.formats) else 0.0

    def dense(self) -> Callable[[], Tensor]:
        """torch's own code."""
        last = lambda t: t.contiguous(memory_format=torch.channels_last)  # noqa: E731
        x, kernel, res = last(self.x), last(self.kernel), None if self.res is None else last(self.res)
        return lambda: self._convolution(x, kernel, self.bias, res)

    def candidate(self, tuner: Any, fmt: Format, config: Any) -> Callable[[], Tensor]:
        """A kernel on the packed weight, between token-minor values."""
        weight, p = self.problem.weight, self.picture
        shape = (weight.shape[0], weight.shape[1])
        _, kernel = tuner.kernel((fmt,), self.problem.epilogue, self.res is not None, "token", shape, to_text(config))
        arrays = list(fmt.pack(weight).values())
        x, res = _pixels(self.x), None if self.res is None else _pixels(self.res)
        if p.window == (1, 1, 1, 1) and not any(p.pads):
            return lambda: kernel(x, arrays, self.bias, res)
        _, patches = tuner.window("patches", p.window, "")
        return lambda: kernel(patches(x, p.size, p.window, p.pads), arrays, self.bias, res)

    def reference(self) -> Tensor:
        """float64, as a sequence of pixels."""
        res = None if self.res is None else self.res.double()
        return self._convolution(self.x.double(), self.kernel.double(), self.bias.double(), res).flatten(2).transpose(1, 2)

    def _convolution(self, x: Tensor, kernel: Tensor, bias: Tensor, res: Tensor | None) -> Tensor:
        y = self.act(_convolution(self.picture, x, kernel, bias))
        return y if res is None else y + res


class WindowCall:
    """A window with `outputs`, or, if None, one for every channel: as torch runs it on channels-last pictures, and as a kernel does on
    planes."""

    def __init__(self, picture: Picture, outputs: int | None, epilogue: str) -> None:
        self.picture, self.epilogue, random = picture, epilogue, torch.Generator().manual_seed(0)
        B, C = max(1, min(picture.B, torch.get_num_threads())), picture.channels
        self.direct, shape = outputs is not None, (C,) if outputs is None else (outputs, C)
        self.x, self.bias = torch.randn(B, C, *picture.size, generator=random), torch.randn(shape[0], generator=random)
        self.weight = torch.randn(*shape, *picture.window[:2], generator=random)

    def dense(self) -> Callable[[], Tensor]:
        """torch's own code."""
        x = self.x.contiguous(memory_format=torch.channels_last)
        return lambda: self._convolution(x, self.weight, self.bias)

    def candidate(self, tuner: Any) -> Callable[[], Tensor]:
        """The kernel."""
        p, x = self.picture, _pixels(self.x)
        if self.direct:
            _, kernel = tuner.direct(p.channels, out_size(p.size, p.window, p.pads)[1], p.window, self.epilogue)
        else:
            _, kernel = tuner.window("depthwise", p.window, self.epilogue)
        return lambda: kernel(x, self.weight, self.bias, p.size, p.window, p.pads)

    def reference(self) -> Tensor:
        """float64, as a sequence of pixels."""
        return self._convolution(self.x.double(), self.weight.double(), self.bias.double()).flatten(2).transpose(1, 2)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight if self.direct else weight[:, None]
        return ACTIVATIONS[self.epilogue].fn(_convolution(self.picture, x, weight, bias, 1 if self.direct else len(bias)))


def _convolution(picture: Picture, x: Tensor, kernel: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    """torch's, of a padded picture."""
    top, left, bottom, right = picture.pads
    even = (top, left) == (bottom, right)
    x = x if even else F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, kernel, bias, picture.window[2:], (top, left) if even else 0, groups=groups)


def _pixels(picture: Tensor) -> Tensor:
    """The token-minor sequence."""
    return _minor(picture.flatten(2).transpose(1, 2))


def _minor(value: Tensor) -> Tensor:
    """The same, token-minor; what is behind the last token is zero, as kernels leave it."""
    y = empty_output(value, value.shape[-1], "token")
    torch.as_strided(y, (y.untyped_storage().nbytes() // 4,), (1,)).zero_()
    return y.copy_(value)
