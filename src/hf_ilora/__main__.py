"""`python -m hf_ilora`, the same as the command `hf-ilora`."""

import sys

from hf_ilora_cli.main import main

sys.exit(main())
