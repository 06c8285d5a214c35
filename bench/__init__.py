"""`python -m bench`: what bonus_ops costs and how exact it is, beside torch and the paper's formula."""

import os

# read when torch is imported: its memory profiler would write two lines to stderr per measurement
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
