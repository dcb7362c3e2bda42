"""`python -m opencoca` is the command `opencoca`."""

import sys

from opencoca.cli import main

sys.exit(main())
