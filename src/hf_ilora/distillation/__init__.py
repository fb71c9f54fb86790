"""Distillation of a recommender that is slow and knows language into one that is fast: DLLM2Rec and around it."""
