"""Trainers of next-item models, of iLoRA and of distilled students, with their arguments, data sets and collators."""
