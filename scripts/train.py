"""The script to submit: `ray submit cluster.yaml scripts/train.py -- --config ... --executor ray`.

It accepts the options of `metadist train` and needs only the installed package. `ray submit` runs
it on the head node, where it submits the run to Ray as a job and follows it. The run outlives the
connection; the same command again follows the run, resumes it if it was interrupted, or reports
that it is finished. See docs/cluster.md.
"""

import sys

from metadist.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", "--working_dir", "null", "--", *sys.argv[1:]]))
