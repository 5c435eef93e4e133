"""Entry point of `python -m tools.preprocess`."""

import sys

from tools.preprocess.cli import main

sys.exit(main())
