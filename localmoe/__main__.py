"""`python -m localmoe`: the same as the `localmoe` command."""

import sys

from localmoe.cli.app import main

sys.exit(main())
