"""`python -m llmloss_ext` is `llmloss`."""

import sys

from llmloss_ext.cli.main import main

sys.exit(main())
