"""Configuration of GRU4Rec."""

from .configuration_next_item import NextItemConfig, strict_config


@strict_config
class GRU4RecConfig(NextItemConfig):
    r"""Architecture and training loss of a GRU4Rec model; the fields of `NextItemConfig` come first.

    `hidden_dropout` applies to the embeddings, between the layers and to their output. The paper and the programs of
    LLaRA and DLLM2Rec score with a separate item table and biases: `tie_word_embeddings=False, head_bias=True`. The
    programs of LLaRA and DLLM2Rec have no dropout (`hidden_dropout=0`) and PyTorch's initial weights
    (`initialization="reference"`, `initializer_range=0.01`). By default, the gates start as in the paper's program.

    Args:
        num_hidden_layers: layers of the GRU.

    Source: GRU4Rec (ICLR 2016).
    """

    model_type = "gru4rec"

    num_hidden_layers: int = 1

    def validate_architecture(self) -> None:
        """Check the ranges of all fields; `@strict_config` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        super().validate_architecture()
        self.check_at_least_one("num_hidden_layers")


GRU4RecConfig.register_for_auto_class()

__all__ = ["GRU4RecConfig"]
