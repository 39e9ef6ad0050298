"""
A tiny decoder with grouped cross attention (GCA, arXiv 2410.01651) and its trainer.

model: the decoder; data: the synthetic tasks; train: resumable training pieces; eval: accuracy by
context length; weights: safetensors files. All need torch and numpy alone. See README.md.
"""
