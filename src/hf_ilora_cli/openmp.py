"""Makes the threads of a program sleep while they wait. Import it before torch, which loads OpenMP.

By default OpenMP's threads spin while they wait for one another. A small model runs thousands of small operations a
second. Beside another busy program, each operation waits for a thread that has no core, and training takes 20 times as
long. An OMP_WAIT_POLICY that is already set is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
