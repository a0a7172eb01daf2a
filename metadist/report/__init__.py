"""A run, or a comparison, as one HTML page that needs nothing else: `metadist report`.

page.py         the page: sections, tables, pictures; all text is escaped
charts.py       curves and histograms as SVG
of_run.py       the sections of a run
of_comparison.py   the sections of a comparison
"""

from metadist.report.of_comparison import comparison_page
from metadist.report.of_run import run_page

__all__ = ["comparison_page", "run_page"]
