"""`python -m cmdp_fast` is `cmdp-fast`."""

import sys

from cmdp_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
