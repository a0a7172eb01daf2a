"""The script to submit: `ray submit cluster.yaml scripts/train.py -- --config ... --executor ray`.

Takes the options of `metadist train` and needs nothing but the installed package. Under
`ray submit` it runs on the head node, so Ray is taken to be there.
"""

import os
import sys

from metadist.cli import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.exit(main(["train", *sys.argv[1:]]))
