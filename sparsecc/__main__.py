"""The command line: `python -m sparsecc opt` runs passes over program text, `python -m sparsecc explain` shows a compile's decisions."""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecc.debug import closest
from sparsecc.errors import SparseccError, SpecError
from sparsecc.explain import Explanation
from sparsecc.passes.manager import Pass

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. What is wrong with the input goes to stderr as a message, without a traceback."""
    args = _parser().parse_args(argv)
    try:
        print(args.command(args).rstrip("\n"))
    except (SparseccError, OSError) as error:
        print(f"sparsecc: {error}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sparsecc", description="A compiler for sparse PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    opt = commands.add_parser("opt", help="run passes over a program in text form and print the result")
    opt.add_argument("file", help="program text, such as a dump holds; - for standard input")
    opt.add_argument("--passes", help="comma-separated, run in this order; default: what the pipeline runs after the text's stage")
    opt.add_argument("--weights", metavar="F.safetensors", help="the program's constants; default: made up from their types")
    opt.set_defaults(command=_opt)

    explain = commands.add_parser("explain", help="compile a model and print the table of decisions, or print a saved one")
    explain.add_argument("model", help="MODEL.py:factory, a function that returns (model, example_inputs); or a saved explanation, X.json")
    explain.add_argument("--sparsity", help='"detect" (the default) or a pattern, such as "block(4, 1)"')
    explain.add_argument("--target", default="cpu", help="default: cpu")
    explain.add_argument("--autotune", default="quick", choices=("none", "quick", "full"), help="default: quick")
    explain.add_argument("--threads", type=_positive, metavar="N", help="torch.set_num_threads(N)")
    explain.add_argument("--json", action="store_true", help="print it as JSON, which this command reads again")
    explain.set_defaults(command=_explain)
    return parser


def _opt(args: argparse.Namespace) -> str:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from sparsecc.ir.text import parse_program
    from sparsecc.passes import PIPELINE
    from sparsecc.passes.manager import run_passes

    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
    try:
        tensors = load_file(args.weights) if args.weights else None
    except SafetensorError as error:
        raise SpecError(f"--weights {args.weights} is no safetensors file: {error}") from error
    program = parse_program(text, tensors)
    done, rest = _split(PIPELINE, program.stage)
    chosen = rest if args.passes is None else _named(PIPELINE, args.passes)
    facts = frozenset(fact for one in done for fact in one.ensures)
    return run_passes(program, [_Resumed(one, facts) for one in chosen], disable=()).steps[-1].text


def _split(pipeline: Sequence[Pass], stage: str) -> tuple[Sequence[Pass], Sequence[Pass]]:
    """The passes up to the one that made `stage`, and those after it; a stage that no pass makes is a captured program."""
    at = next((i + 1 for i, one in enumerate(pipeline) if one.name == stage), 0)
    return pipeline[:at], pipeline[at:]


def _named(pipeline: Sequence[Pass], names: str) -> list[Pass]:
    known = {one.name: one for one in pipeline}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise SpecError(f"--passes: there is no pass {name!r}; {closest(name, list(known))}")
    return [known[name] for name in wanted]


@dataclass(frozen=True)
class _Resumed:
    """A pass run on text: facts that the passes before the text's stage ensured are not asked for again."""

    one: Pass
    facts: frozenset[str]

    @property
    def name(self) -> str:
        return self.one.name

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(fact for fact in self.one.requires if fact not in self.facts)

    @property
    def ensures(self) -> tuple[str, ...]:
        return self.one.ensures

    def run(self, program: Any, context: Any) -> None:
        self.one.run(program, context)


def _explain(args: argparse.Namespace) -> str:
    found = Explanation.load(args.model) if args.model.endswith(".json") else _compiled(args).explain()
    return json.dumps(found.to_dict(), indent=1) if args.json else str(found)


def _compiled(args: argparse.Namespace) -> Any:
    import torch

    from sparsecc.compile import compile as compile_model

    if args.threads:
        torch.set_num_threads(args.threads)
    made = _factory(args.model)()
    if not (isinstance(made, tuple) and len(made) == 2):
        raise SpecError(f"{args.model} returned {type(made).__name__}, not (model, example_inputs)")
    model, example = made
    inputs = (example,) if isinstance(example, torch.Tensor) else example
    return compile_model(model, target=args.target, sparsity=args.sparsity, example_inputs=inputs, autotune=args.autotune)


def _factory(place: str) -> Callable[[], Any]:
    """The function at FILE.py:name. The file's own folder is importable, as if it were run as a script."""
    file, colon, name = place.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise SpecError(f"{place!r}: expected MODEL.py:factory, or a saved explanation whose name ends in .json")
    if not path.is_file():
        raise SpecError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"sparsecc_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise SpecError(f"{file} has no function {name!r}; {closest(name, own)}")
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
