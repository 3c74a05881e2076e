"""`python -m llmloss_ext` is `llmloss`."""

import sys

from .cli.main import main

sys.exit(main())
