"""`python -m widedeep ...`, and `torchrun -m widedeep train ...`."""

import sys

from widedeep.cli import main

sys.exit(main())
