"""TVMScript, and the pieces of it that kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sparsecc.codegen.lines import Lines

ALIGN = {"float32": 4, "float16": 2, "bfloat16": 2, "uint16": 2, "uint8": 1, "int8": 1, "int32": 4}


Registers = Callable[[int, int], str]
"""(row, vector) -> the accumulator."""


class Writer(Lines):
    """Lines, and the idioms of TVMScript."""

    def let(self, name: str, value: str) -> str:
        """Bind an expression to a new name and return that."""
        self.made += 1
        self(f"{name}_{self.made}: T.let = {value}")
        return f"{name}_{self.made}"

    def opaque(self, name: str, value: str) -> None:
        """Bind an int64 through a local array. TVM's prover would follow a plain binding into every use of it, and takes seconds
        over divisions by run-time sizes; LLVM makes a register of the array."""
        self(f'{name}_at = T.alloc_buffer((1,), "int64", scope="global")')
        self(f"{name}_at[0] = {value}")
        self(f"{name}: T.let = {name}_at[0]")

    def registers(self, name: str, rows: int, vectors: int, lanes: int) -> Registers:
        """Declare rows x vectors accumulators, a buffer per row. TVM puts arrays of scope "global" under a kilobyte on the stack, where
        LLVM finds that they fit registers; all others come from its workspace, at the price of a call each."""
        for row in range(rows):
            self(f'{name}{row} = T.alloc_buffer(({vectors * lanes},), "float32", scope="global")')
        return lambda row, vector: vec(f"{name}{row}", vector * lanes, lanes)

    def registers_of(self, dtype: str, name: str, lanes: int) -> str:
        """Declare one accumulator of another dtype; returns it."""
        self(f'{name} = T.alloc_buffer(({lanes},), "{dtype}", scope="global")')
        return vec(name, 0, lanes)

    @contextmanager
    def function(self, name: str, pointers: Mapping[str, str], ints: tuple[str, ...]) -> Iterator[None]:
        """A kernel: raw pointers (name -> element dtype) and int64 scalars. Only element alignment is promised: TVM would
        otherwise assume 64 bytes and fault on a view such as `x[1:]`."""
        params = [f'{p}_h: T.handle("{dtype}")' for p, dtype in pointers.items()] + [f"{i}: T.int64" for i in ints]
        self("@T.prim_func(s_tir=True)")
        with self.block(f"def {name}({', '.join(params)}):"):
            self(f'T.func_attr({{"tirx.noalias": True, "global_symbol": "{name}"}})')
            for pointer, dtype in pointers.items():
                self(f'{pointer} = T.decl_buffer((T.int64(1) << T.int64(40),), "{dtype}", data={pointer}_h, align={ALIGN[dtype]})')
            # Without tensor arguments TVM cannot see the device that local arrays live on.
            self('T.attr(T.int32(0), "device_id", 0)')
            self('T.attr(T.int32(0), "device_type", 1)')
            yield


def vec(buffer: str, offset: str | int, lanes: int) -> str:
    """The vector of `lanes` elements at an offset; the scalar if lanes is 1."""
    return f"{buffer}[{offset}]" if lanes == 1 else f"{buffer}[T.ramp({offset}, 1, {lanes})]"


def splat(value: str, lanes: int) -> str:
    """A scalar in every lane."""
    return value if lanes == 1 else f"T.broadcast({value}, {lanes})"


def constant(value: float, lanes: int) -> str:
    """A float32 literal in every lane."""
    return splat(f"T.float32({value!r})", lanes)
