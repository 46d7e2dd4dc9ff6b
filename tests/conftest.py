"""Settings of every test run: one BLAS thread, no display, no network, and the same examples each time."""

import os

# Before anything imports numpy, numba or torch: two pools of spinning threads starve each other.
# And one thread for numba too: its OpenMP layer would set torch's number, and with it the last bits of its sums.
for _name in ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMBA_NUM"):
    os.environ.setdefault(f"{_name}_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

# `HYPOTHESIS_PROFILE=explore` looks for examples that nobody has seen yet.
settings.register_profile(
    "ci", derandomize=True, deadline=None, database=None, max_examples=50, print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=500, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
