"""The names of published files of weights."""

SAFE, PICKLES = ".safetensors", (".bin", ".pth", ".pt", ".ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOLDER = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # by preference
