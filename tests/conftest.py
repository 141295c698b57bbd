"""One thread for every test and for what it starts: tensors are small, files are tested side by side, and threads would wait for one another."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; runs are compared bit by bit, so whatever the shell says
