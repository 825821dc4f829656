"""Set before torch is imported: threads of several workers that wait for each other make every one of them slow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
