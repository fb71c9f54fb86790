"""Reads the files that the authors of LLaRA, iLoRA and DLLM2Rec published."""
