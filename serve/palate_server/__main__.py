"""`python -m palate_server SPEC.json`: sets up logging to stderr and runs the server."""

import logging
import sys

from palate_server.server import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="palate_server: %(message)s")
    sys.exit(main(sys.argv[1:]))
