"""Fixtures of the integrations' tests: those of the trainer, where its packages are there."""

try:
    from pair_fixtures import one_thread, own_precision, pair
except ImportError:  # verl's and OpenRLHF's tests need none of it
    pass
else:
    __all__ = ["one_thread", "own_precision", "pair"]
