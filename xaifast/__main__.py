"""``python -m xaifast`` and ``torchrun ... -m xaifast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
