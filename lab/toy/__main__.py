"""Draw a data set of the toy world: python -m lab.toy NAME [--out DIR] [--n N] [--size PIXELS]."""
import argparse
import sys
from pathlib import Path

from . import DATASETS, DEFAULT_SIZE, draw, ensure


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints on one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv=None):
    parser = Parser(prog="lab.toy", description="Draw a data set of the toy world.")
    parser.add_argument("name", help=f"one of: {', '.join(DATASETS)}")
    parser.add_argument("--out", help="folder to draw into (default: datasets/toy/NAME-SIZE)")
    parser.add_argument("--n", type=int, help="training pictures per domain, or clips "
                        "(default: the data set's own)")
    parser.add_argument("--size", type=int, help="pixels, at least 16 (default: 64; "
                        "horse2zebra_single 256, digits 28 and 112)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes")
    args = parser.parse_args(argv)
    size = DEFAULT_SIZE.get(args.name) if args.size is None else args.size
    try:
        if args.out is None:
            out = ensure(args.name, size, n=args.n, seed=args.seed)
        else:
            out = Path(args.out)
            draw(args.name, out, n=args.n, size=size, seed=args.seed)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot write {args.out or problem.filename}: {problem.strerror}")
    print(f"{args.name}: {out}\nsamples: {out / 'contact.png'}")


if __name__ == "__main__":
    sys.exit(main())
