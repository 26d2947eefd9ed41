"""`cmdp-fast report`: what trainings have written, on one page."""
