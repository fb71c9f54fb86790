"""A web page on which visitors try models side by side; only `page` imports Gradio."""

import importlib


def check_gradio() -> None:
    """Raise a ValueError unless Gradio is installed."""
    try:
        importlib.import_module("gradio")
    except ModuleNotFoundError as error:
        raise ValueError(f'the demo needs gradio ({error}): pip install "hf_ilora[demo]"') from error
