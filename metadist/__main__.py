"""`python -m metadist` is the command `metadist`."""

import sys

from metadist.cli import main

if __name__ == "__main__":
    sys.exit(main())
