"""From the words of a command line to settings (`parsing.py`), and what `--help` shows (`screens.py`)."""
