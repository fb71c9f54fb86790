"""Makes the threads of a program sleep while they wait. Import it before torch, which loads OpenMP.

By default OpenMP's threads spin while they wait for one another. A small model takes thousands of small operations a
second, and beside another busy program each of them waits for a thread that does not run: training takes 20 times as
long. An OMP_WAIT_POLICY that is already set is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
