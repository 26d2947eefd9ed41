"""A study: many situations and methods, a training for each with several seeds; the figures of all in one file."""
