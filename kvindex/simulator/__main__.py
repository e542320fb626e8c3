"""`python -m kvindex.simulator` is `kvindex sim`."""

import argparse
import sys

from kvindex.simulator import cli


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvindex.simulator")
    cli.add_arguments(parser)
    return cli.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
