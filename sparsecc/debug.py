"""Every environment knob, and the dump directory.

SPARSECC_DUMP=dir          write the program after every pass, the kernels, the weights and a repro there (see `Dumper`)
SPARSECC_STOP_AFTER=pass   run the pipeline up to this pass; what it left undone runs by its dense meaning
SPARSECC_DISABLE=a,b       leave these passes out
SPARSECC_CACHE=dir         where tuning results are kept; ~/.cache/sparsecc if unset

They are read at each compile, so a test or a notebook may set them between two compiles.
"""
from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsecc.errors import SpecError
from sparsecc.formats import Pattern
from sparsecc.ir.program import Program
from sparsecc.ir.text import tensors_of
from sparsecc.ir.types import TensorType, parse_dim, parse_type
from sparsecc.spec import Rule, SparsitySpec

WEIGHTS = "weights.safetensors"
_CLAIM = "DUMP.txt"
_LONGEST_NAME = 100
_FIRST_SIZE, _SIZE_STEP = 5, 2


@dataclass(frozen=True)
class Knobs:
    """The environment's wishes; None or empty for a variable that is unset or empty."""

    dump: Path | None = None
    stop_after: str | None = None
    disable: frozenset[str] = frozenset()
    cache: Path | None = None


def knobs(passes: Sequence[str] | None = None) -> Knobs:
    """Read the environment. With `passes`, raise SpecError for a pass name that is not among them, naming the closest."""
    stop_after = os.environ.get("SPARSECC_STOP_AFTER", "").strip() or None
    disable = frozenset(name.strip() for name in os.environ.get("SPARSECC_DISABLE", "").split(",") if name.strip())
    if passes is not None:
        _check_names("SPARSECC_STOP_AFTER", [stop_after] if stop_after else [], passes)
        _check_names("SPARSECC_DISABLE", sorted(disable), passes)
    return Knobs(_path("SPARSECC_DUMP"), stop_after, disable, _path("SPARSECC_CACHE"))


def cache_dir() -> Path | None:
    """Where tuning results are kept: SPARSECC_CACHE, else ~/.cache/sparsecc; None for a user without a home directory."""
    try:
        return knobs().cache or Path.home() / ".cache" / "sparsecc"
    except RuntimeError:
        return None


def closest(name: str, known: Sequence[str]) -> str:
    """The way out of a misspelt name: `did you mean 'fuse'?`, or the list of known names."""
    near = difflib.get_close_matches(name, known, 3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known) or 'none'}"


class Dumper:
    """Writes what the compiler did into a directory that a person can read and run.

    NN_pass.py, NN_pass.diff   the program after each pass, and how it differs from the one before
    kernels/*.py               generated sources
    weights.safetensors        the constants of the program
    repro.py                   compiles the captured program again and compares it with running it as captured

    The first compile writes into `root`, later ones into root/2, root/3, ...: nothing is overwritten, nothing stale is mixed in,
    and processes may share a root. `self.root` is where this one writes. Raises SpecError if the directory can't be made.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _claim(Path(root))
        self._stages: dict[str, str] = {}
        self._last = ""

    def stage(self, index: int, name: str, text: str, previous_text: str | None = None) -> Path:
        """Write NN_name.py, and NN_name.diff against the previous program if there is one (empty: the pass changed nothing)."""
        path = self.root / f"{index:02d}_{_file_name(name)}.py"
        path.write_text(text)
        if previous_text is not None:
            before, after = previous_text.splitlines(keepends=True), text.splitlines(keepends=True)
            diff = difflib.unified_diff(before, after, self._last or "before", path.name)
            path.with_suffix(".diff").write_text("".join(diff))
        self._stages[text] = self._last = path.name
        return path

    def kernel(self, name: str, source: str) -> Path:
        """Write kernels/name.py; the same name with another source gets a number."""
        folder, stem, count = self.root / "kernels", _file_name(name), 1
        folder.mkdir(exist_ok=True)
        path = folder / f"{stem}.py"
        while path.exists() and path.read_text() != source:
            count += 1
            path = folder / f"{stem}_{count}.py"
        path.write_text(source)
        return path

    def weights(self, program: Program, file: str = WEIGHTS) -> Path:
        """Write the program's constants by attribute, as `parse_program` takes them."""
        from safetensors.torch import save_file

        seen: set[int] = set()
        saved = {name: _own(tensor, seen) for name, tensor in tensors_of(program).items()}
        save_file(saved, self.root / file, {"stage": program.stage})
        return self.root / file

    def repro(self, text: str, inputs: Sequence[TensorType | str], options: Mapping[str, Any] | None = None) -> Path:
        """Write repro.py for the captured program `text` with flat inputs of these types and `compile_program`'s options.

        Options that text can't hold are left out, and listed in the file.
        """
        if text not in self._stages:
            (self.root / "captured.py").write_text(text)
            self._stages[text] = "captured.py"
        kept: list[str] = []
        lost: list[str] = []
        for name, value in (options or {}).items():
            try:
                kept.append(f"    {name!r}: {_literal(value)},")
            except ValueError:
                lost.append(name)
        types = [str(i) for i in inputs]
        source = _REPRO.format(
            program=self._stages[text],
            weights=WEIGHTS,
            inputs="\n".join(f"    {t!r}," for t in types),
            sizes=default_sizes(types),
            options="\n".join([*kept, *(f"    # {name!r} can't be written as text" for name in lost)]),
        )
        path = self.root / "repro.py"
        path.write_text(source)
        return path


def default_sizes(types: Sequence[str]) -> dict[str, int]:
    """A small, distinct size for every symbol in the types, so that mixed-up dimensions show."""
    symbols: dict[str, int] = {}
    for text in types:
        for dim in _dims(text):
            for name in sorted(s.name for s in getattr(dim, "free_symbols", ())):
                symbols.setdefault(name, _FIRST_SIZE + _SIZE_STEP * len(symbols))
    return symbols


def random_inputs(types: Sequence[str], sizes: Mapping[str, int], seed: int = 0) -> list[Any]:
    """Values of the types: normal floats, 0 and 1 for integers and bools (valid as tokens, masks and indices), ints for sym[..]."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Any] = []
    for text in types:
        shape = [int(d) if isinstance(d, int) else int(d.subs({s: sizes[s.name] for s in d.free_symbols})) for d in _dims(text)]
        if text.startswith("sym["):
            made.append(shape[0])
            continue
        dtype = parse_type(text).dtype
        if dtype.is_floating_point or dtype.is_complex:
            made.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(dtype))
    return made


def max_error(want: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest |want - got| of any output, relative to the largest |want| of that output (absolute where that is 0).

    inf if shapes, plain values, or the places of NaN and infinities differ.
    """
    if len(want) != len(got):
        return float("inf")
    return max((_error(w, g) for w, g in zip(want, got, strict=True)), default=0.0)


def _error(want: Any, got: Any) -> float:
    if not (isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)):
        return 0.0 if type(want) is type(got) and want == got else float("inf")
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    wide = torch.complex128 if want.is_complex() else torch.float64
    w, g = want.detach().to("cpu", wide), got.detach().to("cpu", wide)
    finite = w.isfinite()
    if not torch.equal(finite, g.isfinite()) or not torch.equal(w[~finite].nan_to_num(0.5), g[~finite].nan_to_num(0.5)):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((w - g)[finite].abs().max()) / (float(w[finite].abs().max()) or 1.0)


def _check_names(variable: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise SpecError(f"{variable}: there is no pass {name!r}; {closest(name, known)}")


def _path(variable: str) -> Path | None:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser() if value else None


def _claim(root: Path) -> Path:
    """`root`, or the first free root/2, root/3, ...; creating the marker exclusively settles races between processes."""
    path, count = root, 1
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with open(path / _CLAIM, "x") as marker:
                marker.write(f"{inspect.cleandoc(Dumper.__doc__ or '')}\n")
            return path
        except FileExistsError as error:
            if not path.is_dir():
                raise SpecError(f"SPARSECC_DUMP: {path} is a file; name a directory") from error
            count += 1
            path = root / str(count)
        except OSError as error:
            raise SpecError(f"SPARSECC_DUMP: can't write to {path} ({error.strerror}); name a directory that can be written") from error


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")[:_LONGEST_NAME] or "unnamed"


def _own(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    """A contiguous tensor with memory of its own, as safetensors wants it; copied only where it has not."""
    tensor = tensor.detach().cpu().contiguous()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    seen.add(tensor.untyped_storage().data_ptr())
    return tensor


def _dims(text: str) -> Sequence[Any]:
    """The shape in a type's text; of sym[expr], the expression alone."""
    return [parse_dim(text[4:-1])] if text.startswith("sym[") else parse_type(text).shape


def _literal(value: Any) -> str:
    """An option as Python. Raises ValueError for what has no text."""
    match value:
        case float():
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        case None | bool() | int() | str():
            return repr(value)
        case Pattern():
            return repr(str(value))
        case Rule():
            text = "dense" if value.dense else "detect" if value.pattern is None else str(value.pattern)
            named = {"codec": value.codec, "compute": value.compute}
            given = "".join(f", {name}={option!r}" for name, option in named.items() if option is not None)
            return f"options({text!r}{given})" if given else repr(text)
        case SparsitySpec():
            return _literal(dict(value.entries))
        case Mapping():
            return f"{{{', '.join(f'{k!r}: {_literal(v)}' for k, v in value.items())}}}"
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case tuple():
            return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    raise ValueError(f"{type(value).__name__} has no text")


_REPRO = '''"""Compiles the captured program beside this file again, and compares it with running it as captured. Edit what you like.

For a machine that isn't this one it is compiled and explained."""
from pathlib import Path

from safetensors.torch import load_file

from sparsecc.compile import Options, build
from sparsecc.debug import max_error, random_inputs
from sparsecc.ir.text import parse_program
from sparsecc.spec import options  # noqa: F401  (OPTIONS may use it)
from sparsecc.target import home, is_elsewhere

HERE = Path(__file__).parent
PROGRAM, WEIGHTS = HERE / {program!r}, HERE / {weights!r}
INPUTS = [
{inputs}
]
SIZES = {sizes}  # any sizes that the model allows
OPTIONS = {{
{options}
}}


def load(device):
    """The captured program with tensors of its own; made-up ones if the weights were not dumped."""
    return parse_program(PROGRAM.read_text(), load_file(WEIGHTS, device=device) if WEIGHTS.exists() else None)


if __name__ == "__main__":
    asked = Options.of(OPTIONS)
    device = home(asked.target)
    inputs = [one.to(device) if hasattr(one, "to") else one for one in random_inputs(INPUTS, SIZES)]
    built = build(load(device), inputs, asked)
    if is_elsewhere(asked.target):
        print(built.explanation)
    else:
        want, got = load(device).run(*inputs), built.run(*inputs)
        print(f"max error {{max_error(want, got):.3g}}, relative to the largest value of each output")
'''
