"""Launches any recipe, as a pipeline launches its stages.

    python -m hf_ilora_cli.launch_recipe RECIPE [--launch NAME] [--num_processes N] [option ...]

Unlike `accelerate launch`, it ends with the recipe's exit code and without a traceback of its own.
"""

import sys
from pathlib import Path

from .signals import INTERRUPTED_CODE, end_with_parent

if __name__ == "__main__":
    end_with_parent()
    try:
        from .launching import launch_words  # takes seconds, during which Ctrl-C must end quietly too

        sys.exit(launch_words(Path(sys.argv[1]), sys.argv[2:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_CODE)
