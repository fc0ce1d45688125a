"""`python -m seqmodels` is `longseq`."""

import sys

from seqmodels.cli import main

sys.exit(main())
