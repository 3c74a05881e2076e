"""The report of a run: tables, plots and a page."""
