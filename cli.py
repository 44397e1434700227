import sys

from tc_deploy.cli import main

sys.exit(main())
