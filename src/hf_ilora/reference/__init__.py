"""What the authors of SASRec, LLaRA, iLoRA and DLLM2Rec published, read into this package's formats."""
