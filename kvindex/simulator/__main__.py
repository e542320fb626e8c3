"""`python -m kvindex.simulator` is `kvindex sim`."""

import argparse
import sys

from kvindex.errors import ConfigError, KvindexError
from kvindex.simulator import cli


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvindex.simulator")
    cli.add_arguments(parser)
    try:
        return cli.run(parser.parse_args())
    except KvindexError as error:
        print(f"kvindex sim: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
