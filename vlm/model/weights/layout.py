"""The names of published files of weights."""

SAFE, PICKLES = ".safetensors", (".bin", ".pth", ".pt", ".ckpt")
GGUF = ".gguf"  # one language model, tokenizer and all
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDER = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # by preference
