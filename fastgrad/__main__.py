"""``python -m fastgrad``."""

import sys

from fastgrad.commands.cli import main

sys.exit(main())
