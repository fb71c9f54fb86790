"""A saved model on the Hub: its files complete, in one commit, with a card that holds what was measured."""

from .model_card import write_card
from .publish import ModelFolder, check_folder, push_folder

__all__ = ["ModelFolder", "check_folder", "push_folder", "write_card"]
