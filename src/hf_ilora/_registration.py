"""Makes AutoConfig and AutoModel know the recommenders of hf_ilora, at no cost to a program that never uses them.

Registering takes the classes, and the classes take torch and ``PreTrainedModel``, which are slow to import. So
``import hf_ilora`` only watches what transformers imports, and registers once the auto classes are there.
It waits until the outermost watched import has ended: inside of it, what our models import may be half executed
(modeling_utils imports configuration_auto, and importing a tokenizer imports modeling_auto on the way).
"""

import functools
import importlib.abc
import sys
import threading


def register_with_auto_classes() -> None:
    """Registers at once where transformers' auto classes are imported already, else as soon as they are."""
    watcher = _ImportWatcher()
    sys.meta_path.insert(0, watcher)
    watcher.register_what_is_imported()


def _register_configs() -> None:
    from transformers import AutoConfig

    from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
    from hf_ilora.models.next_item.configuration_caser import CaserConfig
    from hf_ilora.models.next_item.configuration_counting import PopularityConfig, TransitionCountsConfig
    from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
    from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig

    for config_class in (
        SASRecConfig,
        GRU4RecConfig,
        CaserConfig,
        PopularityConfig,
        TransitionCountsConfig,
        ILoraConfig,
    ):
        AutoConfig.register(config_class.model_type, config_class)


def _register_models() -> None:
    from transformers import AutoModel

    from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
    from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
    from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem
    from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
    from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem

    # AutoModel gives the whole recommender and not a bare encoder such as SASRecModel: every saved model holds its
    # head, `recommend` needs it, and the recommenders that count have no encoder. One name then loads any of them.
    for model_class in (
        SASRecForNextItem,
        GRU4RecForNextItem,
        CaserForNextItem,
        PopularityForNextItem,
        TransitionCountsForNextItem,
        ILoraForRecommendation,
    ):
        AutoModel.register(model_class.config_class, model_class)


class _Executing(threading.local):
    """How many watched modules a thread is executing, one inside the other."""

    depth = 0


class _ImportWatcher(importlib.abc.MetaPathFinder):
    """Finds modules as the finders behind it do, and registers after the outermost import of a watched module."""

    def __init__(self):
        self.pending = {
            "transformers.models.auto.configuration_auto": _register_configs,
            "transformers.models.auto.modeling_auto": _register_models,
        }
        self.executing = _Executing()

    def find_spec(self, fullname, path, target=None):
        if not fullname.startswith(("transformers.", "hf_ilora.")):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # a namespace package has none
                    spec.loader.exec_module = functools.partial(self.execute, spec.loader.exec_module)
                return spec
        return None

    def execute(self, exec_module, module) -> None:
        depth = self.executing.depth
        self.executing.depth = depth + 1
        try:
            exec_module(module)
            if depth == 0:
                self.register_what_is_imported()
        finally:
            self.executing.depth = depth

    def register_what_is_imported(self) -> None:
        while imported := [name for name in self.pending if name in sys.modules]:
            register = self.pending.pop(imported[0])  # first, because registering imports watched modules itself
            register()
        if not self.pending:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
