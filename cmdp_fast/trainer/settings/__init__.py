"""What a run is told: its settings (`config.py`), where their defaults come from (`recipe.py`), and what they say of a
step (`constraint.py`)."""
