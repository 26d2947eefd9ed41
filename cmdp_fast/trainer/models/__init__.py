"""Student and teacher: how the pair is loaded (`pair.py`) or made, what is added to a model, and how it is saved."""
