"""Publishes a saved model on the Hub in one commit: its complete files and a card with its measurements."""

from .model_card import write_card
from .publish import ModelFolder, card_files, check_folder, files_of_model, push_folder

__all__ = ["ModelFolder", "card_files", "check_folder", "files_of_model", "push_folder", "write_card"]
