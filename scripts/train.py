"""The script to submit: `ray submit cluster.yaml scripts/train.py -- --config ... --executor ray`.

Takes the options of `metadist train` and needs nothing but the installed package. `ray submit`
runs it on the head node, where it hands the run to Ray as a job and follows it. The run outlives
the connection; submitted again with the same --run_dir, this follows it, continues it where it was
interrupted, or says that it is done. See docs/cluster.md.
"""

import sys

from metadist.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", "--working_dir", "null", "--", *sys.argv[1:]]))
