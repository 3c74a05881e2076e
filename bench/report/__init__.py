"""What people look at: tables, plots and a page from the results of a run."""
