"""One thread for every process of a test run.

Two workers share two cores, and so do processes that tests start. Threads that wait for each other
while another process has their core make tests several times slower. Set here, before anything
imports numpy or torch.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
