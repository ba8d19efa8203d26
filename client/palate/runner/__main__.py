"""`python -m palate.runner URI` is `palate-run URI`."""

import sys

from palate.runner import main

sys.exit(main())
