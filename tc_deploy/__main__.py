"""``python -m tc_deploy``: the command line."""

import sys

from tc_deploy.cli import main

sys.exit(main())
