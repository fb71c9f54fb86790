"""iLoRA: a frozen language model whose LoRA experts are gated by a frozen SASRec."""
