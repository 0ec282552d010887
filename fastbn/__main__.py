"""``python -m fastbn``: ``info`` on this machine, ``verify`` its kernels, ``bench`` them; ``onnx`` tells what a model has.

`verify` runs every kernel that can run here over shapes that straddle its vectors, and over some that are big enough
for threads, through the public functions. The results are held against `reference`, in float64, with the accuracy
that fastbn promises. It needs NumPy alone. `onnx` is `fastbn.onnx.check` and `fold`, for a file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import benchmark, cpu, dispatch, reference
from fastbn.dtypes import DTYPES
from fastbn.environment import MOST_THREADS
from fastbn.introspection import problems
from fastbn.layout import Array, LayoutName
from fastbn.tables import counted, print_within, size

LANES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 65, 97, 100)  # on both sides of every vector's length
SHAPES = (
    *((3, 5, 1, spatial) for spatial in LANES),
    *((3, channels, 2, 3) for channels in LANES),
    # More than 128 KiB in every dtype, so that threads are used.
    (4, 33, 25, 25),
    (2, 97, 21, 21),
    (1, 5, 141, 141),
)
# By name: the layout, and whether the channels are last in memory.
MEMORIES: dict[str, tuple[LayoutName, bool]] = {
    "NCHW": ("NCHW", False),
    "NHWC": ("NHWC", True),
    "NCHW with channels-last strides": ("NCHW", True),
}
MODES = ("inference", "training")
EPS = 1e-5
MOMENTUM = 0.25


class Bounds(NamedTuple):
    """Promised accuracy of one arithmetic type.

    Attributes
    ----------
    y : float
        Error of y, relative to the larger of 1 and abs(y).
    var : float
        Relative error of the variance.
    gradient : float
        Error of a gradient, relative to the largest of the terms it is made of.
    """

    y: float
    var: float
    gradient: float


# The kernels promise 1e-13 in float64. The reference is float64 too, and with means that are a hundred standard
# deviations from zero it is off by some 5e-13 itself.
BOUNDS = {"float32": Bounds(5e-6, 1e-6, 1e-5), "float64": Bounds(1e-12, 1e-12, 1e-12)}


class Inputs(NamedTuple):
    """Arguments of one problem; x and dy have the shape (N, C, H, W)."""

    x: Array
    dy: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array


Results = dict[str, Any]


def draw(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Inputs:
    """Random inputs, with means of up to a hundred standard deviations: what naive formulas get wrong."""
    rng = np.random.default_rng(shape)
    compute = DTYPES[dtype.name].compute
    far = 100 if dtype == compute else 2  # 16 bits hold no more
    scale = 10 ** rng.uniform(-1, 1, shape[1])
    offset = rng.uniform(-far, far, shape[1]) * scale
    weight, bias, shift, spread = rng.standard_normal((4, shape[1]))
    x = rng.standard_normal(shape) * scale[:, None, None] + offset[:, None, None]
    vectors = weight, bias, offset + shift * scale, np.square((1 + np.abs(spread)) * scale)
    return Inputs(x.astype(dtype), rng.standard_normal(shape).astype(dtype), *(v.astype(compute) for v in vectors))


def run(given: Inputs, memory: str) -> Results:
    """Compute all that fastbn can from the inputs, with x and dy in one of `MEMORIES`."""
    layout, channels_last = MEMORIES[memory]

    def arrange(a: Array) -> Array:
        if not channels_last:
            return a
        last = np.ascontiguousarray(a.transpose(0, 2, 3, 1))
        return last if layout == "NHWC" else last.transpose(0, 3, 1, 2)

    def restore(a: Any) -> Any:
        return a.transpose(0, 3, 1, 2) if layout == "NHWC" else a

    def unwritten() -> Array:
        """Memory for a result, where an element that the kernel forgets is sure to show."""
        return np.full_like(x, np.nan)

    x, dy = arrange(given.x), arrange(given.dy)
    mean, var = given.mean.copy(), given.var.copy()
    stats = fastbn.batch_norm_stats(x, layout=layout)
    results: Results = {"mean": stats.mean, "var": stats.var, "running_mean": mean, "running_var": var}
    for mode in MODES:  # training comes last: it updates the running statistics
        y, saved = fastbn.batch_norm_forward(
            x, given.weight, given.bias, mean, var, mode == "training", MOMENTUM, EPS, layout=layout, out=unwritten()
        )  # fmt: skip
        dx, dweight, dbias, _ = fastbn.batch_norm_backward(dy, x, saved, out=unwritten())
        results |= {f"y in {mode}": restore(y), f"dx in {mode}": restore(dx), f"dweight in {mode}": dweight, f"dbias in {mode}": dbias}
    y, saved = fastbn.batch_norm_forward(x, given.weight, given.bias, layout=layout, activation="gelu", residual=dy, out=unwritten())
    dx, _, _, dresidual = fastbn.batch_norm_backward(dy, x, saved, wrt=("x", "residual"), out=unwritten())
    return results | {"y with gelu": restore(y), "dx with gelu": restore(dx), "dresidual": restore(dresidual)}


def expect(given: Inputs) -> tuple[Results, Results]:
    """Compute the same with the reference, and how far from that a kernel may be."""
    bounds = BOUNDS[given.weight.dtype.name]
    rounding = float(np.finfo(given.weight.dtype).eps)
    x, dy, weight, bias, mean, var = (a.astype(np.float64) for a in given)
    count, batch_mean, batch_var = reference.batch_norm_stats(x)
    want = {
        "mean": batch_mean,
        "var": batch_var,
        "running_mean": (1 - MOMENTUM) * mean + MOMENTUM * batch_mean,
        "running_var": (1 - MOMENTUM) * var + MOMENTUM * batch_var * count / (count - 1),
    }
    may = {name: bounds.var * np.abs(want[name]) for name in ("var", "running_var")}
    for name in ("mean", "running_mean"):
        may[name] = bounds.var * np.sqrt(batch_var) + rounding * np.abs(want[name])

    def last_place(a: Array) -> Array | float:
        """One unit in the last place of what is stored in 16 bits; for wider types the bounds say it all."""
        return np.spacing(np.abs(a).astype(given.x.dtype)).astype(np.float64) if given.x.itemsize == 2 else 0.0

    for mode, m, v in zip(MODES, (mean, batch_mean), (var, batch_var), strict=True):
        y = reference.batch_norm(x, m, v, weight, bias, EPS)
        want[f"y in {mode}"] = y
        may[f"y in {mode}"] = bounds.y * np.maximum(1, np.abs(y)) + last_place(y)
        dx, dweight, dbias = reference.batch_norm_backward(dy, x, m, v, weight, EPS, training=mode == "training")
        want |= {f"dx in {mode}": dx, f"dweight in {mode}": dweight, f"dbias in {mode}": dbias}
        # With few values per channel the terms of dx all but cancel; its error has the size of the first one. A sum
        # of terms of either sign may cancel too: its natural size is the root of the sum of their squares.
        invstd = 1 / np.sqrt(v + EPS)
        direct = np.abs(dy).max((0, 2, 3)) * invstd * np.abs(weight)
        x_hat = (x - m[:, None, None]) * invstd[:, None, None]
        may[f"dx in {mode}"] = bounds.gradient * direct[:, None, None] + last_place(dx)
        if mode == "training":
            value, slope = (function(y + dy, 0.0) for function in reference.ACTIVATIONS["gelu"])
            want |= {"y with gelu": value, "dresidual": dy * slope}
            want["dx with gelu"], *_ = reference.batch_norm_backward(dy * slope, x, m, v, weight, EPS)
            # The slope of gelu changes by as much as its argument is off, and less.
            for name, size in (("y with gelu", np.abs(value)), ("dresidual", np.abs(dy))):
                may[name] = bounds.y * np.maximum(1, np.maximum(size, np.abs(y))) + 2 * last_place(want[name])
            may["dx with gelu"] = 2 * bounds.gradient * direct[:, None, None] + last_place(want["dx with gelu"])
        may[f"dbias in {mode}"] = bounds.gradient * np.sqrt(np.square(dy).sum((0, 2, 3)))
        may[f"dweight in {mode}"] = bounds.gradient * np.sqrt(np.square(dy * x_hat).sum((0, 2, 3)))
    return want, may


@np.errstate(invalid="ignore")
def worst(got: Results, want: Results, may: Results) -> tuple[float, str]:
    """Largest error as a fraction of what is allowed, and the name of the result that has it."""
    tiny = np.finfo(np.float64).tiny
    errors = {name: np.abs(got[name].astype(np.float64) - want[name]) / (may[name] + tiny) for name in want}
    return max((float(np.where(np.isnan(error), np.inf, error).max()), name) for name, error in errors.items())


def dtypes() -> Iterator[np.dtype[Any]]:
    """Yield the dtypes of the table, bfloat16 only where ml_dtypes is installed."""
    for name in DTYPES:
        if name != "bfloat16":
            yield np.dtype(name)
        else:
            try:
                yield np.dtype(import_module("ml_dtypes").bfloat16)
            except ImportError:
                print("bfloat16 is left out: ml_dtypes is not installed (pip install ml_dtypes)", file=sys.stderr)


def show_progress(done: int, total: int) -> None:
    """Draw a bar, on a terminal only."""
    if sys.stderr.isatty():
        bar = "#" * (40 * done // total)
        print(f"\r[{bar:<40}] {done}/{total}", end="\r\033[K" if done == total else "", file=sys.stderr, flush=True)


class Tally(NamedTuple):
    """How a kernel did with a dtype: the cases it ran, the worst error, and where that was."""

    cases: int = 0
    error: float = 0.0
    where: str = ""


def verify(names: Sequence[str], as_json: bool = False) -> int:
    """Run the kernels against the reference and print a table; 1 if any differs or none can run, else 0."""
    unusable = {name: reason for name in names if (reason := dispatch.KERNELS[name].unusable())}
    usable = [name for name in names if name not in unusable]
    tested = list(dtypes())
    tallies = {(kernel, d.name): Tally() for kernel, d in product(usable, tested) if not dispatch.KERNELS[kernel].declines(d.name)}
    threads = sorted({1, fastbn.get_num_threads()})
    cases = list(product(tested, SHAPES))
    for done, (dtype, shape) in enumerate(cases, 1):
        given = draw(shape, dtype)
        want, may = expect(given)
        for kernel, memory, n in product(usable, MEMORIES, threads):
            if (kernel, dtype.name) not in tallies:
                continue
            with fastbn.use_kernel(kernel), fastbn.num_threads(n):
                error, name = worst(run(given, memory), want, may)
            where = f"{name}, {'x'.join(map(str, shape))}, {memory}, {counted(n, 'thread')}"
            before = tallies[kernel, dtype.name]
            tallies[kernel, dtype.name] = Tally(before.cases + 1, *max((error, where), before[1:]))
        show_progress(done, len(cases))

    failed = not tallies or any(t.error > 1 for t in tallies.values())
    if as_json:
        kept = [{"kernel": kernel, "dtype": name, **t._asdict(), "ok": t.error <= 1} for (kernel, name), t in tallies.items()]
        print(json.dumps({"ok": not failed, "results": kept, "cannot run": unusable}, indent=2))
        return int(failed)
    print(f"{'kernel':<11}{'dtype':<9}{'cases':>5} {'worst':>6}  {'':<8}where")
    for (kernel, dtype_name), t in tallies.items():
        verdict = "ok" if t.error <= 1 else "DIFFERS"
        print_within(f"{kernel:<11}{dtype_name:<9}{t.cases:>5} {t.error:6.2g}  {verdict:<8}", t.where)
    for kernel, reason in unusable.items():
        print_within(f"{kernel:<11}", f"cannot run: {reason}")
    print("\nworst: the largest error, as a fraction of what fastbn promises.")
    return int(failed)


def text_of(value: object) -> str:
    """A value of the report for people."""
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def info(as_json: bool = False) -> int:
    """Print what `fastbn.show_config` says, and what is wrong; 1 if anything is."""
    report: Mapping[str, Any] = {"fastbn": fastbn.__version__}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrong = problems()
        try:
            report = fastbn.show_config()
        except Exception as error:  # whoever asks what is wrong needs an answer
            wrong.append(str(error))
    said = [str(warning.message) for warning in caught]
    if as_json:
        print(json.dumps({**report, "warnings": said, "problems": wrong}, indent=2))
        return 1 if wrong else 0
    sizes = {"caches": ("l1", "l2", "l3"), "memory": ("in_use", "idle", "limit")}
    for key, value in report.items():
        entries = value if isinstance(value, dict) else {"": value}
        for i, (name, entry) in enumerate(entries.items()):
            shown = size(entry) if name in sizes.get(key, ()) and entry is not None else text_of(entry)
            if key == "waking" and entry is not None:
                shown = f"{entry * 1e6:.0f} us"
            if (key, name) == ("selected", "bfloat16") and find_spec("ml_dtypes") is None:
                shown += ", once ml_dtypes is installed (pip install ml_dtypes)"
            print_within(f"{'' if i else key:<11}{f'{name}: ' if name else ''}", shown)
    for warning in said:
        print_within("warning    ", warning)
    for problem in wrong:
        print_within("problem    ", problem)
    return 1 if wrong else 0


def onnx(path: str, seconds: float, folded: str | None, rewrite: bool, as_json: bool) -> int:
    """Print the normalization nodes of a model, and write the model without those that can be folded."""
    try:
        import fastbn.onnx as models

        if folded is not None and (wrong := _unwritable(Path(path), Path(folded))):
            raise ValueError(wrong)
        report = models.check(path, seconds=seconds)
        smaller = None if folded is None else models.fold(path, rewrite)
    except (ImportError, ValueError) as error:
        print(f"python -m fastbn: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if folded is not None and smaller is not None:
        try:
            models.protos.write(smaller, Path(folded))
        except OSError as error:
            print(f"python -m fastbn: {error}", file=sys.stderr)
            return 1
        print(f"wrote {folded}", file=sys.stderr)
    return 0


def _unwritable(model: Path, folded: Path) -> str:
    """Why the folded model cannot have this name; looked for before anything is measured."""
    from fastbn.onnx.protos import external_files

    if folded.is_dir() or not folded.parent.is_dir():
        return f"--fold must be a file in a folder that exists: {folded}"
    if folded.exists() and model.exists() and folded.samefile(model):
        return f"--fold must be another file than the model: {folded}"
    tensors = [file for file in external_files(model) if file.exists()]
    data = folded.with_name(f"{folded.name}.data")  # where tensors go that are too large for one file
    for written in (folded, data):
        if written.exists() and any(map(written.samefile, tensors)):
            return f"--fold must be a file whose tensors are not the model's: {written}"
    return ""


def overview() -> int:
    """Say in a screen what fastbn is here and what can be asked of it; 1 if something is wrong."""
    wrong = problems()
    print(f"fastbn {fastbn.__version__}: batch normalization for CPUs\n")
    print_within("  processor  ", (cpu.model() or "unknown") + (f", {counted(fastbn.get_num_threads(), 'thread')}" if not wrong else ""))
    if not wrong:
        chosen = {dtype: dispatch.pinned() or dispatch.select(dtype).name for dtype in DTYPES}
        for i, kernel in enumerate(dict.fromkeys(chosen.values())):
            for_these = ", ".join(dtype for dtype in chosen if chosen[dtype] == kernel)
            print_within(f"  {'' if i else 'kernel':<11}", f"{kernel} for {for_these}")
    for problem in wrong:
        print_within("  problem    ", problem)
    print("\ncommands, each with --help:")
    for name, about in COMMANDS.items():
        print_within(f"  python -m fastbn {name:<8}", about)
    return int(bool(wrong))


COMMANDS = {
    "info": "everything that was found on this machine, and what is wrong",
    "verify": "compare every kernel that can run here with the reference",
    "bench": "how fast it is here, beside a copy and NumPy",
    "onnx": "list the normalization nodes of an ONNX model, and fold its batch norms",
}
WORDS = {"info": """\
words:
  used      how many threads a large call runs on
  affinity  processors that this process may run on
  quota     processors that its control group may use
  cost      what waking a thread takes the caller; delay: until the thread runs
  worth     work for each thread, from which on those that sleep are woken
  in_use    large outputs that are alive; idle: their memory, kept for the next
  limit     of what is idle; hits and misses: outputs with kept and new memory
  selected  the kernel for each dtype; pinned: the one that was chosen for all

"""}
EXAMPLES = {
    "info": "examples:\n  python -m fastbn info\n  python -m fastbn info --json | jq .kernels",
    "verify": "examples:\n  python -m fastbn verify\n  python -m fastbn verify --kernel simd_v3 --json",
    "bench": "examples:\n  python -m fastbn bench\n  python -m fastbn bench --shape 32,64,56,56 --layout channels_last \n"
    "  python -m fastbn bench --shape 4096,256 --dtype float64 --json\n\n"
    "For a PyTorch model: fastbn.torch.benchmark(model, x). Whole networks and other\nlibraries: python -m bench in a checkout.",
    "onnx": "examples:\n  python -m fastbn onnx model.onnx\n  python -m fastbn onnx model.onnx --fold folded.onnx",
}  # fmt: skip


def argument(
    parse: Callable[[str], Any], wanted: str, least: float | None = None, most: float = sys.float_info.max
) -> Callable[[str], Any]:
    """The type of an argument: what it is parsed by, what it must be, for the one line of an error, and the bounds of a number."""

    def parsed(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error) if parse is benchmark.shape_of else f"must be {wanted}, got {text!r}") from None
        if least is not None and not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parsed


def parser_of_commands() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastbn", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What fastbn runs on this machine, whether it is right, and how fast it is.\nWithout a command: an overview.",
        epilog="examples:\n" + "\n".join(line for text in EXAMPLES.values() for line in text.splitlines() if line.startswith("  ")),
    )  # fmt: skip
    parser.add_argument("-V", "--version", action="version", version=f"fastbn {fastbn.__version__}")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the report as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON; without a command, that of info")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    made = {
        name: commands.add_parser(
            name, parents=[as_json], help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=WORDS.get(name, "") + EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, about in COMMANDS.items()
    }  # fmt: skip
    for one in made.values():
        one.set_defaults(refuse=one.error)
    made["info"].description += "\nExit status 1 if anything is."  # type: ignore[operator]
    made["verify"].description += "\nExit status 1 if any differs."  # type: ignore[operator]
    made["verify"].add_argument("--kernel", choices=list(dispatch.KERNELS), help="this kernel only")
    add = made["bench"].add_argument
    add("--shape", action="append", type=argument(benchmark.shape_of, "a shape"), metavar="N,C,H,W", help="may be given several times")
    add("--layout", choices=["channels_first", "NCHW", "channels_last", "NHWC"], help="order of the axes in memory (default: both)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of x, y and the gradients (default: %(default)s)")
    threads = argument(int, f"a whole number from 1 to {MOST_THREADS}", 1, MOST_THREADS)
    add("--threads", type=threads, metavar="N", help="default: as many as a call would use")
    seconds = argument(float, "a number of seconds above 0", sys.float_info.min)
    add("--seconds", type=seconds, default=8.0, help="for all measurements (default: %(default)s)")
    add = made["onnx"].add_argument
    add("model", metavar="MODEL.onnx")
    seconds = argument(float, "a number of seconds of at least 0", 0)
    add("--seconds", type=seconds, default=1.0, help="how long to measure by ONNX Runtime; 0 does not (default: %(default)s)")
    add("--fold", metavar="OUT.onnx", help="write the model with its batch norms folded")
    add("--rewrite", action="store_true", help="with --fold: batch norms that stay become what runs in parallel")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the result is the exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; None means those of the process.

    Returns
    -------
    int
        0 where all is well; 1 if a kernel differs from the reference, none could be tested, something is wrong with the
        environment, a model cannot be read or the report could not be written; 128 and the signal's number after Ctrl-C and a
        closed pipe.
    """
    args = parser_of_commands().parse_args(argv)
    if args.command == "onnx":
        if args.rewrite and args.fold is None:
            args.refuse("--rewrite goes with --fold")
        return to_the_end(lambda: onnx(args.model, args.seconds, args.fold, args.rewrite, args.json))
    if args.command == "verify":
        return to_the_end(lambda: verify([args.kernel] if args.kernel else list(dispatch.KERNELS), args.json))
    if args.command == "bench":
        if args.dtype == "bfloat16" and find_spec("ml_dtypes") is None:
            args.refuse("--dtype bfloat16 needs ml_dtypes: pip install ml_dtypes")
        given = args.shape, args.layout, args.dtype, args.threads, args.seconds, args.json
        return to_the_end(lambda: args.refuse(found[0]) if (found := problems()) else benchmark.run(*given))
    if args.command == "info" or args.json:
        return to_the_end(lambda: info(args.json))
    return to_the_end(overview)


def to_the_end(command: Callable[[], int]) -> int:
    """Run a command; where its reader, its disk or its user gives up, say so in a line at most."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it, as by `>&-`
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to say nothing
    try:
        with warnings.catch_warnings():  # a line of this file says nothing to who typed a command
            warnings.showwarning = lambda message, *_: print(f"python -m fastbn: {message}", file=sys.stderr)
            status = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted" if sys.stderr.isatty() else "interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        with suppress(io.UnsupportedOperation):  # Python would try again to write what is left, at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # as after `| head`
            return 128 + signal.SIGPIPE
        print(f"python -m fastbn: {error.strerror}", file=sys.stderr)
        return 1
    except (MemoryError, Warning) as error:  # warnings are errors by `-W error`
        print(f"python -m fastbn: {str(error) or 'not enough memory'}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
