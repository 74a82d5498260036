"""`python -m fuserl` is the `fuserl` command."""

import sys

from fuserl.cli import main

sys.exit(main())
