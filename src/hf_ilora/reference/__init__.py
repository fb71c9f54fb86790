"""Reads the files that the authors of SASRec, LLaRA, iLoRA and DLLM2Rec published."""
