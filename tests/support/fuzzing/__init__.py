"""The fuzzer: a seed of 64 bits is a case, a case is held to laws. tests/fuzz runs it."""
