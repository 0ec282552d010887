"""Command line: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import chain, zip_longest
from math import prod
from pathlib import Path

import fastbn
from bench import again, options, report, roofline, text
from bench.cases import NETWORKS, Case, add, cases, quick
from bench.data import DTYPES, LAYOUTS
from bench.measure import Row, measure
from bench.peers import BY_NAME, OPS, Contender, choose
from bench.progress import each
from bench.published import SETS, read_traced
from bench.timing import Budget

RESULTS = Path(__file__).parent / "results"
BUILT_IN = frozenset(NETWORKS)
UNUSUAL = ("floor", "tiny", *SETS)  # networks that run when they are named
LARGEST_ITEM = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
COMMANDS = {"compare": "bench.compare", "report": "bench.again", "merge": "bench.again", "readme": "bench.readme"}
PROGRAMS = (  # of their own: python -m bench.NAME
    "busy", "growth", "in_keras", "in_torch", "instructions", "norms", "preactivation", "roofline", "same", "situ", "situations", "sync",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure fastbn on the layers of real networks, beside a copy, what the machine can do, and every library with a\n"
        "batch norm for CPUs that is installed here. Ctrl-C ends it early and writes what there is.",
        epilog="""examples:
  python -m bench --quick                                         a minute, three shapes of each network
  python -m bench --networks benchdnn-resnet50 --dtype bfloat16   oneDNN's list for ResNet-50
  python -m bench --quick --peers torch onednn --html bench.html  some of the peers, and a page with plots
  python -m bench compare before.json after.json                  two runs, row by row
  python -m bench merge a.json b.json --json all.json             runs of several lists or dtypes as one
  python -m bench report all.json --html all.html                 a report anew from what a run has written
  python -m bench readme                                          README's tables and pictures from the run that is committed

More: python -m bench.situ, bench.in_torch, bench.busy, bench.growth, bench.roofline, bench.instructions, bench.same
(each with --help).""",
    )
    default, results = [name for name in NETWORKS if name not in UNUSUAL], "PATH; a file that is there is kept under another name"
    add = parser.add_argument
    add("--quick", action="store_true", help="three shapes of each network, of at most 2^23 elements, in a minute or two")
    add("--networks", nargs="+", choices=list(NETWORKS), default=default, metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: %(default)s)")  # fmt: skip
    add("--traced", nargs="+", type=options.input_file, default=[], metavar="FILE",
        help="logs of PyTorch's operators, whose shapes are measured, too")  # fmt: skip
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="order of the axes in memory (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of x, y and the gradients (default: %(default)s)")
    add("--largest", type=options.whole(1), default=1024, metavar="MB", help="leave out larger tensors (default: %(default)s)")
    add("--peers", nargs="+", choices=list(BY_NAME), metavar="NAME",
        help=f"{', '.join(BY_NAME)} (default: all that are installed but torch.compile; copy and fastbn always)")  # fmt: skip
    add("--threads", nargs="+", type=options.threads, default=[fastbn.get_num_threads()], metavar="N",
        help="for every contender; several numbers measure each case with each (default: %(default)s)")  # fmt: skip
    add("--processes", type=options.whole(1), default=1, metavar="N",
        help="measure in so many processes, one after the other (default: %(default)s)")  # fmt: skip
    add("--budget", type=options.seconds, metavar="SECONDS", help="for all measurements of a process (default: 900, or 45 with --quick)")
    add("--json", type=options.output_file, default=str(RESULTS / "bench.json"), metavar="PATH", help=f"{results} (default: %(default)s)")
    add("--markdown", type=options.output_file, default=str(RESULTS / "bench.md"), metavar="PATH", help=f"{results} (default: %(default)s)")
    add("--csv", type=options.output_file, metavar="PATH", help="also one line for each row and contender")
    add("--html", type=options.output_file, metavar="PATH", help="also one page with plots")
    add(
        "--roofline", type=options.output_folder, nargs="?", const=str(RESULTS), metavar="FOLDER",
        help="also draw time against bytes, in this folder (without one: %(const)s)",
    )  # fmt: skip
    return parser


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    options.need_different(parser, arguments, again.WRITTEN)
    for option in ("roofline", "html"):
        if getattr(arguments, option) is not None:
            options.need(parser, f"--{option}", "matplotlib")
    if arguments.dtype == "bfloat16":
        options.need(parser, "--dtype bfloat16", "ml_dtypes")
    for name in arguments.peers or ():
        if not BY_NAME[name].installed():
            parser.error(f"--peers {name} needs {BY_NAME[name].package}, which is not installed")
    # The photographs are among what runs where no network is named.
    options.need(parser, "it", "rich", *("sklearn", "PIL") * ("photographs" in arguments.networks))
    taken = set(BUILT_IN)
    for path in arguments.traced:
        try:
            found = read_traced(path)
        except (OSError, ValueError) as error:
            parser.error(f"--traced: {error}")
        if path.stem in taken:
            parser.error(f"--traced: another network is called {path.stem}, so {path} needs another name")
        taken.add(path.stem)
        add(path.stem, found)
        arguments.networks.append(path.stem)
    return arguments


def _choose(networks: Sequence[str], layouts: Sequence[str], few: bool, largest: float = float("inf")) -> list[tuple[Case, str]]:
    """List the cases, one of each network in turn, the largest first: what does not fit the time is the smallest of all networks."""
    chosen = quick if few else cases
    ordered = [sorted(chosen(network), key=lambda case: -prod(case.shape)) for network in dict.fromkeys(networks)]
    turns = (case for case in chain.from_iterable(zip_longest(*ordered)) if case is not None and prod(case.shape) <= largest)
    return [(case, layout) for case in turns for layout in dict.fromkeys(layouts)]


def _run(
    chosen: Sequence[tuple[Case, str]], dtype: str, seconds: float, contenders: Sequence[Contender], threads: Sequence[int]
) -> tuple[list[Row], bool]:
    """Measure every case in its layout; also whether Ctrl-C ended it."""
    items = [(case, layout, n) for case, layout in chosen for n in dict.fromkeys(threads)]
    budget = Budget(seconds, len(items) * len(OPS))

    def work(item: tuple[Case, str, int]) -> Iterator[Row]:
        with fastbn.num_threads(item[2]):
            yield from measure(*item[:2], dtype, budget, contenders)

    return each(items, lambda item: f"{item[0].network} {'x'.join(map(str, item[0].shape))} {item[1]}", work, report.latest)


def _wait(process: subprocess.Popen[bytes]) -> bool:
    """Wait for a process; whether Ctrl-C came meanwhile, which it gets, too, and writes what it has."""
    interrupted = False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # noqa: PERF203  at most one or two
            interrupted = True
    return interrupted


def _in_processes(arguments: argparse.Namespace) -> tuple[list[list[Row]], bool]:
    """The rows of several processes that measure the same; also whether Ctrl-C ended one, whose rows are among them."""
    several = ("networks", "layouts", "peers", "threads", "traced")
    command = [sys.executable, "-m", "bench", *["--quick"] * arguments.quick]
    for name in (*several, "dtype", "largest", "budget"):
        value = getattr(arguments, name)
        if name == "networks":
            value = [network for network in value if network not in {path.stem for path in arguments.traced}]
        if name == "traced":  # they are read in another folder
            value = [path.resolve() for path in value]
        if value:
            command += [f"--{name}", *map(str, value if name in several else [value])]
    found, interrupted = [], False
    for _ in range(arguments.processes):
        with tempfile.TemporaryDirectory() as folder:
            paths = [f"{folder}/bench.{ending}" for ending in ("json", "md")]
            process = subprocess.Popen(  # noqa: S603  our own arguments
                [*command, "--json", paths[0], "--markdown", paths[1]], stdout=subprocess.DEVNULL, cwd=RESULTS.parents[1]
            )
            interrupted = _wait(process)
            if Path(paths[0]).exists():
                found.append(report.read_json(Path(paths[0]).read_text(encoding="utf-8"))[1])
            if interrupted or process.returncode:
                break
    return found, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the reports and print the summary."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in COMMANDS:
        return int(import_module(COMMANDS[argv[0]]).main(argv))
    if argv and argv[0] in PROGRAMS:
        _parser().error(f"{argv[0]} is a program of its own: python -m bench.{argv[0]}")
    arguments = _arguments(argv)
    chosen = _choose(arguments.networks, arguments.layouts, arguments.quick, arguments.largest * 1e6 / LARGEST_ITEM[arguments.dtype])
    if not chosen:
        _parser().error("no shape of these networks is left: all are too large for --quick, or for --largest")
    contenders = choose(arguments.peers)
    for contender in contenders:
        contender.load()  # PyTorch takes seconds that are nobody's measurement
    with fastbn.num_threads(max(arguments.threads)):
        about = report.machine(arguments.dtype, contenders)
    wanted = Counter(case.network for case, _ in chosen for _ in OPS for _ in dict.fromkeys(arguments.threads))
    if arguments.processes > 1:
        found, interrupted = _in_processes(arguments)
        rows = again.combine(found)
    else:
        seconds = arguments.budget or (45.0 if arguments.quick else 900.0)
        rows, interrupted = _run(chosen, arguments.dtype, seconds, contenders, arguments.threads)
    if interrupted:
        print(f"interrupted after {len(rows)} of {sum(wanted.values())} measurements", file=sys.stderr)
    elif not rows:
        print("There was no time for a single measurement; give a larger --budget.", file=sys.stderr)
    if not rows:
        return options.INTERRUPTED if interrupted else 1
    left_out = dict(wanted - Counter(row.network for row in rows))
    written = again.write(about, rows, left_out, arguments)
    if arguments.roofline is not None:
        print("wrote", *roofline.draw(about, rows, arguments.roofline), file=sys.stderr)
    text.show(report.summary(about, rows, left_out))
    return options.INTERRUPTED if interrupted else int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
