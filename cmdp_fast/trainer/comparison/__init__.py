"""`cmdp-fast compare`: the runs (`plan.py`), how they are run (`compare.py`), and a table and plots of the results."""
