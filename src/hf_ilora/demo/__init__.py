"""A page in the browser on which people try models side by side; `page` alone imports Gradio."""

import importlib


def check_gradio() -> None:
    """Raise a ValueError unless Gradio is installed."""
    try:
        importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise ValueError(f'the demo needs gradio ({error}): pip install "hf_ilora[demo]"') from error
