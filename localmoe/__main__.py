"""`python -m localmoe`: the same as the `localmoe` command."""

import sys

from localmoe.cli.start import main

sys.exit(main())
