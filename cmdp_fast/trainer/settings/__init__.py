"""The settings of a run (`config.py`), the files with their defaults (`recipe.py`), and the constraint of a step that
follows from them (`constraint.py`)."""
