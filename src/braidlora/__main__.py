"""`python -m braidlora` is the `braidlora` command."""

import sys

from braidlora.cli import main

sys.exit(main())
