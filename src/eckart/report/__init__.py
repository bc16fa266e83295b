"""The report: what a model's spectra say, as one HTML page that needs neither a network nor a server.

The charts are drawn by the page's own few hundred lines of script, not by plotly: its bundle alone is 4.8 MB, so that
a page with the figures of 210 layers would pass 5 MB, and its heat maps are pictures in which no key finds a cell.
"""

from .advice import Advice, advise
from .figures import report_figures
from .page import check_page, render, write_pages
from .source import Source

__all__ = ["Advice", "Source", "advise", "check_page", "render", "report_figures", "write_pages"]
