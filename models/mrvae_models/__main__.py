"""python -m mrvae_models: the same as the command mrvae."""

import sys

from .cli import main

sys.exit(main())
