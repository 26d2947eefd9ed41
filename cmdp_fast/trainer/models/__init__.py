"""Student and teacher: loading the pair (`pair.py`) or making it, the parts added to a model, and saving it."""
