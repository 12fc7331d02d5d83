"""`python -m pipeline`, which is also installed as `spiking-llm`."""

import sys

from pipeline.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
